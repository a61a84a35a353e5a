"""Every command as one function, for Python code and notebooks.

    import spinecli as spine

    pruned = spine.prune("path/or/id", sparsity=0.3, out="pruned")
    tuned = spine.tune(pruned, out="tuned")

A function takes a config, or its first field and others by name, those of the models inside it too. What it returns can
be named as the input of the next.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import JsonValue

from spinecli.artifacts.context import Progress, RunContext, silent
from spinecli.config import Config, in_words, make_config
from spinecli.errors import OptionError, SpineError

if TYPE_CHECKING:
    from spinecli.artifacts.manifest import Manifest
    from spinecli.evaluation.bench.config import BenchConfig
    from spinecli.evaluation.config import EvaluateConfig
    from spinecli.evaluation.results import Evaluation
    from spinecli.evaluation.sweep.config import SweepConfig
    from spinecli.exports.config import ExportConfig
    from spinecli.federation.config import FederateConfig
    from spinecli.federation.planning.config import PlanConfig
    from spinecli.healing.config import HealConfig
    from spinecli.pruning.config import PruneConfig, TuneConfig

_Kind = TypeVar("_Kind", bound=Config)
_log = logging.getLogger(__name__)
_PathLike = str | os.PathLike[str]
_OUTPUT = {"--out": "out", "--overwrite": "overwrite=True", "--resume": "resume=True", "--dry-run": "no out"}


@dataclass(frozen=True, repr=False)
class Result:
    """What a command has found, and written if it was told where.

    It stands for its path wherever a path is asked for.
    """

    config: Config
    figures: dict[str, JsonValue]
    """The report of `spine.json`, or of the plan where nothing was written."""
    path: Path | None = None
    """What was written; None if nothing was."""
    manifest: Manifest | None = None
    """Of a directory; None of an export, which is left without one."""

    def __fspath__(self) -> str:
        if self.path is None:
            raise OptionError("Nothing was written here; name a directory with out.")
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary})"

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        if self.path is None:
            return "figures alone, nothing was written"
        return f"{self.path}: {self.manifest.summary if self.manifest else 'an export'}"

    def _repr_html_(self) -> str:
        """How a notebook shows it: the summary, and the figures that are single values."""
        plain = {name: value for name, value in self.figures.items() if isinstance(value, (str, int, float))}
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name.replace('_', ' '))}</th>"
            f"<td>{escape(in_words(value))}</td></tr>"
            for name, value in plain.items()
        )
        return f"<p>{escape(self.summary)}</p><table>{rows}</table>"


@dataclass(frozen=True, repr=False, kw_only=True)
class EvaluationResult(Result):
    """Models measured side by side."""

    evaluation: Evaluation

    def table(self) -> str:
        """The comparison as text in columns: beside every model but the first, its ratio to the first one."""
        from spinecli.evaluation.report import comparison_lines

        head, lines = comparison_lines(self.evaluation)
        first, *others = (max(map(len, column)) for column in zip(head, *lines, strict=True))
        return "\n".join(
            "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
            for name, *cells in (head, *lines)
        )

    def _repr_html_(self) -> str:
        """How a notebook shows it: the comparison."""
        from spinecli.evaluation.report import comparison_lines

        head, lines = comparison_lines(self.evaluation)
        drawn = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
        return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{drawn}</table>"


def prune(
    model: _PathLike | PruneConfig,
    *,
    out: _PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Cut blocks, heads and channels out of a checkpoint; see `PruneConfig`. Without `out` nothing is written.

    Raises: OptionError that names a field, and every class of `spinecli.errors` that a checkpoint or a text can cause.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.pruning import run
    from spinecli.pruning.config import PruneConfig
    from spinecli.pruning.decision import planned
    from spinecli.pruning.request import open_request

    with _asked(PruneConfig, model, fields) as config:
        request = open_request(config)
        if out is None:
            decision = run.dry_run(request, _context(progress))
            return Result(config, planned(request, decision).report() | decision.report())
        manifest = run.prune(request, OutputOptions(Path(out), overwrite, resume), _context(progress))
        return Result(config, manifest.report, Path(out), manifest)


def tune(
    pruned: _PathLike | TuneConfig,
    *,
    out: _PathLike,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Recover a pruned checkpoint in closed form; see `TuneConfig`.

    Raises: OptionError that names a field, and every class of `spinecli.errors` that a checkpoint or a text can cause.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.pruning.config import TuneConfig
    from spinecli.pruning.recovery import tune as recovery

    with _asked(TuneConfig, pruned, fields) as config:
        request = recovery.open_request(config)
        manifest = recovery.tune(request, OutputOptions(Path(out), overwrite, resume), _context(progress))
        return Result(config, manifest.report, Path(out), manifest)


def heal(
    pruned: _PathLike | HealConfig,
    *,
    out: _PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Distil the dense checkpoint into a cut one; see `HealConfig`. Without `out` its cost is estimated.

    Raises: OptionError that names a field, TrainingError, and every class of `spinecli.errors` that a checkpoint or a
    text can cause.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.healing import run
    from spinecli.healing.config import HealConfig
    from spinecli.healing.cost import foresee
    from spinecli.healing.request import open_request

    with _asked(HealConfig, pruned, fields) as config:
        request = open_request(config)
        if out is None:
            return Result(config, foresee(request))
        manifest = run.heal(request, OutputOptions(Path(out), overwrite, resume), _context(progress))
        return Result(config, manifest.report, Path(out), manifest)


def plan(
    model: _PathLike | PlanConfig,
    *,
    out: _PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Choose depth and ranks of LoRA for every device of a fleet; see `PlanConfig`. Without `out` nothing is written.

    Raises: OptionError that names a field, FleetError, and what reading a checkpoint can raise.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.federation.planning import run
    from spinecli.federation.planning.config import PlanConfig
    from spinecli.federation.planning.request import open_request

    with _asked(PlanConfig, model, fields) as config:
        decision = run.decide(open_request(config))
        if out is None:
            return Result(config, decision.report())
        manifest = run.plan(decision, OutputOptions(Path(out), overwrite, resume))
        return Result(config, manifest.report, Path(out), manifest)


def federate(
    model: _PathLike | FederateConfig,
    *,
    out: _PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Fine-tune over a fleet of devices; see `FederateConfig`. Without `out` nothing is trained.

    What is found without training is where the labels lie and what memory the strategy asks of each class of devices.

    Raises: OptionError that names a field, FleetError, DataError, FederationError, and what opening the model raises.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.evaluation.quiet import quiet_libraries
    from spinecli.federation.config import FederateConfig
    from spinecli.federation.history import RoundRecord
    from spinecli.federation.launch import launch
    from spinecli.federation.request import open_request
    from spinecli.federation.split.request import split_request
    from spinecli.remote.engines import require_engine, starting_devices

    with quiet_libraries(), _asked(FederateConfig, model, fields) as config:
        require_engine(config.engine.name)
        request = open_request(config)
        for note in request.splits.notes:
            _log.info(note)
        if config.splits:
            request = split_request(request)
        if out is None:
            needs = request.needs()
            refused = request.memory_objection(needs)
            figures = asdict(request.label_table()) | {"memory": [asdict(need) for need in needs], "refused": refused}
            return Result(config, figures)

        def heard(record: RoundRecord) -> None:
            progress("rounds", record.round + 1, config.train.rounds)

        output, connect = OutputOptions(Path(out), overwrite, resume), starting_devices(request, _log.info)
        manifest = launch(request, output, listener=heard, connect=connect)
        return Result(config, manifest.report, Path(out), manifest)


def evaluate(
    model: _PathLike | EvaluateConfig,
    *,
    out: _PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> EvaluationResult:
    """Measure models side by side; see `EvaluateConfig`. With `resume`, what is there already is not measured again.

    Raises: OptionError that names a field, MeasurementError, and what reading a model, a text or data can raise.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.evaluation import run
    from spinecli.evaluation.config import EvaluateConfig

    with _asked(EvaluateConfig, model, fields) as config:
        output = None if out is None else OutputOptions(Path(out), overwrite, resume)
        evaluation, manifest = run.evaluate(config, output, _context(progress))
        place, figures = None if out is None else Path(out), evaluation.model_dump(mode="json")
        return EvaluationResult(config, figures, place, manifest, evaluation=evaluation)


def bench(
    *models: _PathLike | BenchConfig,
    out: _PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Time models side by side in torch and llama.cpp; see `BenchConfig`.

    Raises: OptionError that names a field, MeasurementError, and what reading a model can raise.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.evaluation.bench import run
    from spinecli.evaluation.bench.config import BenchConfig

    asked = models[0] if len(models) == 1 and isinstance(models[0], Config) else [_plain(each) for each in models]
    with _asked(BenchConfig, asked, fields) as config:
        output = None if out is None else OutputOptions(Path(out), overwrite, resume)
        results, manifest = run.bench(config, output, _context(progress))
        return Result(config, results.model_dump(mode="json"), None if out is None else Path(out), manifest)


def sweep(
    model: _PathLike | SweepConfig,
    *,
    out: _PathLike,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Prune a model by several ratios and methods and compare what is left; see `SweepConfig`.

    Raises: OptionError that names a field, MeasurementError, and what reading a checkpoint or a text can raise.
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.evaluation.sweep import run
    from spinecli.evaluation.sweep.config import SweepConfig
    from spinecli.evaluation.sweep.request import open_request

    with _asked(SweepConfig, model, fields) as config:
        context = _context(progress)
        request = open_request(config, context)
        manifest, results = run.sweep(request, OutputOptions(Path(out), overwrite, resume), context)
        return Result(config, results.model_dump(mode="json"), Path(out), manifest)


def export(
    model: _PathLike | ExportConfig,
    *,
    out: _PathLike,
    overwrite: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Result:
    """Write a checkpoint as a GGUF file or a plain directory; see `ExportConfig`.

    Raises: OptionError that names a field, UnexportableError, and every class of `spinecli.errors` that a checkpoint or
    an adapter can cause.
    """
    from spinecli.evaluation.quiet import quiet_libraries
    from spinecli.exports import run
    from spinecli.exports.config import ExportConfig
    from spinecli.exports.run import open_request

    with quiet_libraries(), _asked(ExportConfig, model, fields) as config:
        request = open_request(config, Path(out), overwrite=overwrite)
        return Result(config, run.export(request, _context(progress)).report, Path(out))


def inspect(directory: _PathLike, *, verify: bool = False) -> dict[str, JsonValue]:
    """What a directory is: its manifest, its blocks, and with `verify` the files that differ from their sums.

    Raises: MissingPathError, ForeignArtifactError, and what reading a checkpoint can raise.
    """
    from spinecli.checkpoints.inspection import inspect_directory

    return inspect_directory(Path(directory), verify=verify)


def _context(progress: Progress) -> RunContext:
    """Of a run from Python: its notes are logged."""
    return RunContext(progress=progress, note=_log.info)


@contextmanager
def _asked(kind: type[_Kind], config: object, fields: dict[str, Any]) -> Iterator[_Kind]:
    """The config that is asked for; errors inside name its fields where the command line names flags."""
    try:
        ready = config if isinstance(config, Config) else _plain(config)
        given = {name: _plain(value) for name, value in fields.items()}
        yield make_config(kind, ready, given)
    except SpineError as error:
        error.args = (_in_python(kind, str(error)),)
        raise


def _in_python(kind: type[Config], sentence: str) -> str:
    """A sentence for the command line as it reads in Python: fields instead of flags."""
    names = {found.flag: found.name for found in kind.fields()} | _OUTPUT
    return re.sub(r"--[a-z][a-z-]*[a-z]", lambda match: names.get(match[0], match[0]), sentence)


def _plain(value: Any) -> Any:
    """A result stands for its path."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
