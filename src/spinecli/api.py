"""Every command as one function, for Python code and notebooks.

    import spinecli as spine

    pruned = spine.prune("path/or/id", sparsity=0.3, out="pruned")
    tuned = spine.tune(pruned, out="tuned")

A function takes a config, or its first field and others by name, those of the models inside it too. What it returns can
be named as the input of the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import JsonValue

from spinecli.config import Config, in_words, make_config
from spinecli.errors import OptionError, SpineError
from spinecli.progress import Progress, silent

if TYPE_CHECKING:
    from spinecli.artifacts.manifest import Manifest
    from spinecli.exports.config import ExportConfig
    from spinecli.federation.planning.config import PlanConfig
    from spinecli.pruning.config import PruneConfig, TuneConfig

_Kind = TypeVar("_Kind", bound=Config)
_PathLike = str | os.PathLike[str]
_OUTPUT = {"--out": "out", "--overwrite": "overwrite=True", "--resume": "resume=True", "--dry-run": "no out"}


@dataclass(frozen=True)
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
        found = self.manifest.summary if self.manifest else "a plan" if self.path is None else "an export"
        return found if self.path is None else f"{self.path}: {found}"

    def _repr_html_(self) -> str:
        """How a notebook shows it: the summary, and the figures that are single values."""
        plain = {name: value for name, value in self.figures.items() if isinstance(value, (str, int, float))}
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name.replace('_', ' '))}</th>"
            f"<td>{escape(in_words(value))}</td></tr>"
            for name, value in plain.items()
        )
        return f"<p>{escape(self.summary)}</p><table>{rows}</table>"


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
    from spinecli.pruning.decision import decide
    from spinecli.pruning.request import open_request

    with _asked(PruneConfig, model, fields) as config:
        request = open_request(config)
        if out is None:
            return Result(config, decide(request, progress=progress).report())
        manifest = run.prune(request, OutputOptions(Path(out), overwrite, resume), progress=progress)
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
        manifest = recovery.tune(request, OutputOptions(Path(out), overwrite, resume), progress=progress)
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
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.exports import run
    from spinecli.exports.config import ExportConfig
    from spinecli.exports.request import open_request

    with _asked(ExportConfig, model, fields) as config:
        request = open_request(config, Path(out), overwrite=overwrite)
        return Result(config, run.export(request, Stopwatch(), progress).report, Path(out))


def inspect(directory: _PathLike, *, verify: bool = False) -> dict[str, JsonValue]:
    """What a directory is: its manifest, its blocks, and with `verify` the files that differ from their sums.

    Raises: MissingPathError, ForeignArtifactError, and what reading a checkpoint can raise.
    """
    from spinecli.checkpoints.inspection import inspect_directory

    return inspect_directory(Path(directory), verify=verify)


@contextmanager
def _asked(kind: type[_Kind], config: _PathLike | _Kind, fields: dict[str, Any]) -> Iterator[_Kind]:
    """The config that is asked for; errors inside name its fields where the command line names flags."""
    try:
        ready = config if isinstance(config, Config) else os.fspath(config)
        given = {name: _plain(value) for name, value in fields.items()}
        yield make_config(kind, ready, given)
    except SpineError as error:
        error.args = (in_python(kind, str(error)),)
        raise


def in_python(kind: type[Config], sentence: str) -> str:
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
