"""`spine sweep` as a library call: make and measure one point after the other, then publish the figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output, require_space
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.objective import objective_of
from spinecli.errors import OptionError
from spinecli.evaluation.chain import commands_behind
from spinecli.evaluation.machine import machine_facts, torch_threads
from spinecli.evaluation.models import Subject
from spinecli.evaluation.page.page import REPORT_NAME, Command
from spinecli.evaluation.plots import can_plot
from spinecli.evaluation.sweep.build import POINTS, CheckpointBuilder, HeldOut, Label, ResultCache, hold_out, measure
from spinecli.evaluation.sweep.points import SweepPoint
from spinecli.evaluation.sweep.report import PICTURE_NAME, save_curve, sweep_html
from spinecli.evaluation.sweep.request import SweepRequest
from spinecli.evaluation.sweep.results import RESULTS_NAME, Refusal, SweepResults, SweepRow, WindowRecord
from spinecli.pruning.recovery.recover import held_out_rows

_FIGURES = "figures"


@dataclass(frozen=True, eq=False)
class Walk:
    """Everything that the points have in common."""

    request: SweepRequest
    work: WorkDirectory
    context: RunContext

    def rows(self) -> list[SweepRow | Refusal]:
        """All figures, the dense model's first.

        Raises: OptionError if no point can be cut, and what `prune`, `tune` and measuring raise.
        """
        cache, state = ResultCache(self.work.state / _FIGURES), self.work.state
        calibration = self.request.calibration.read(replace(self.context, state=state))
        request = self.request.settled(calibration)
        builder = CheckpointBuilder(request, state, self.context)
        tokens, opening = calibration.tokens[-held_out_rows(calibration.rows) :], len(calibration.frame.opening)
        held_out = hold_out(request.subject.checkpoint, tokens, request.compute, self.context, opening)
        rows = [cache.recorded("dense", partial(measure, request, request.subject, Label("dense"), held_out))]
        self._tell(rows[0], 0)
        for done, point in enumerate(request.points, start=1):
            rows.append(cache.recorded(point.name, partial(self._point, builder, point, held_out)))
            builder.clear(point, self.work.files / POINTS if request.config.keep else None)
            self._tell(rows[-1], done)
        refused = [row for row in rows if isinstance(row, Refusal)]
        if len(refused) == len(request.points):
            raise OptionError(refused[0].reason)
        return rows

    def _point(self, builder: CheckpointBuilder, point: SweepPoint, held_out: HeldOut) -> SweepRow | Refusal:
        method = point.choice.name
        try:
            made = builder.make(point)
        except OptionError as error:
            # what one ratio asks too much of must not end the others
            return Refusal(name=point.name, method=method, sparsity=point.sparsity, reason=str(error))
        subject = Subject(point.name, str(made.path), Checkpoint.open(made.path))
        tuned = made.tuned.value if made.tuned else None
        label = Label(point.name, method, tuned, point.sparsity, made.achieved_sparsity, made.removed_blocks)
        return measure(self.request, subject, label, held_out)

    def _tell(self, found: SweepRow | Refusal, done: int) -> None:
        self.context.progress("points", done, len(self.request.points))
        if isinstance(found, Refusal):
            self.context.note(f"{found.name}: left out. {found.reason}")
            return
        figures = [f"{found.achieved_sparsity:.1%} removed"] if found.method else []
        figures += [f"perplexity {value:.4g} on {text}" for text, value in found.perplexity.items()]
        figures += [] if found.perplexity else [f"held-out {found.held_out:.4f}"]
        self.context.note(f"{found.name}: {', '.join(figures)}")


def sweep(
    request: SweepRequest, output: OutputOptions, context: RunContext | None = None
) -> tuple[Manifest, SweepResults]:
    """Prune and measure every point; the figures go to a new directory.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, MeasurementError, OptionError if no
    point can be cut, and what reading can raise.
    """
    context = context or RunContext()
    run = Run(
        kind="sweep",
        command="sweep",
        config=request.config,
        parameters=request.parameters(),
        seed=request.config.seed,
        inputs=request.inputs,
        lineage=request.lineage,
    )
    if finished := run.finished(output):
        return finished, read_results(output.path)
    check_output(output, [request.subject.path])
    require_space(output.path.parent, _bytes_needed(request))
    with run.working(output) as work:
        results = _results(request, Walk(request, work, context).rows())
        text = json.dumps(results.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (work.files / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        # without --out: a resumed sweep, and one that is written elsewhere, have the same bytes
        commands = (*commands_behind(run.lineage), Command(run.config.command_line(run.command, run.command)))
        (work.files / REPORT_NAME).write_text(sweep_html(results, commands), encoding="utf-8")
        if can_plot():
            save_curve(results, work.files / PICTURE_NAME)
        report = results.model_dump(mode="json", include={"rows", "refused", "held_out_by"})
        return run.publish(work, _summary(request), report, context.stopwatch.measured()), results


def read_results(directory: Path) -> SweepResults:
    """The results of a finished sweep."""
    return SweepResults.model_validate_json((directory / RESULTS_NAME).read_text(encoding="utf-8"))


def _results(request: SweepRequest, rows: list[SweepRow | Refusal]) -> SweepResults:
    speed, machine = request.speed, None
    if speed:
        with torch_threads(speed.config.threads) as threads:
            machine = machine_facts(speed.config.device, threads)
    texts = {
        passage.text.reference: WindowRecord(
            description=passage.text.description,
            windows=len(seen.tokens),
            window=seen.windowing.window,
            stride=seen.windowing.stride,
            opened_by="".join(seen.frame.names),
        )
        for passage in (request.texts.passages if request.texts else ())
        for seen in passage.windows[:1]
    }
    return SweepResults(
        model=request.config.model,
        held_out_by=objective_of(request.subject.checkpoint).name,
        texts=texts,
        generation=speed.config.generation if speed else None,
        machine=machine,
        heal_tokens=request.config.heal_tokens,
        rows=tuple(row for row in rows if isinstance(row, SweepRow)),
        refused=tuple(row for row in rows if isinstance(row, Refusal)),
    )


def _bytes_needed(request: SweepRequest) -> int:
    """What the points take on disk: all of them if they stay, else a cut and what becomes of it."""
    sizes = [request.subject.checkpoint.bytes * (1 - point.sparsity) for point in request.points]
    return int(sum(sizes) if request.config.keep else 2 * max(sizes))


def _summary(request: SweepRequest) -> str:
    methods = ", ".join(choice.name for choice in request.prunes)
    ratios = ", ".join(f"{ratio:g}" for ratio in request.config.sparsities)
    return f"{request.config.model} by {methods} at {ratios}"
