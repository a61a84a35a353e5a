"""`spine sweep` as a library call: make and measure one point after the other, then publish the figures."""

from __future__ import annotations

import json
from pathlib import Path

from spinecli.artifacts.directory import OutputOptions, check_output, require_space
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.objective import objective_of
from spinecli.evaluation.machine import machine_facts, torch_threads
from spinecli.evaluation.plots import can_plot
from spinecli.evaluation.session import Listeners
from spinecli.sweeping.curve import PICTURE_NAME, save_curve
from spinecli.sweeping.request import SweepRequest
from spinecli.sweeping.results import RESULTS_NAME, Refusal, Row, SweepResults, Windows
from spinecli.sweeping.walk import Walk


def sweep(
    request: SweepRequest,
    output: OutputOptions,
    stopwatch: Stopwatch | None = None,
    listeners: Listeners | None = None,
) -> tuple[Manifest, SweepResults]:
    """Prune and measure every point; the figures go to a new directory.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, MeasurementError, OptionError if no
    point can be cut, and what reading can raise.
    """
    stopwatch, listeners = stopwatch or Stopwatch(), listeners or Listeners()
    run = Run("sweep", "sweep", request.parameters(), request.options.seed, request.inputs, request.lineage)
    if finished := run.finished(output):
        return finished, read_results(output.path)
    check_output(output, [request.subject.path])
    require_space(output.path.parent, _bytes_needed(request))
    with run.working(output) as work:
        results = _results(request, Walk(request, work, stopwatch, listeners).rows())
        text = json.dumps(results.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (work.files / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        if can_plot():
            save_curve(results, work.files / PICTURE_NAME)
        report = results.model_dump(mode="json", include={"rows", "refused", "held_out_by"})
        return run.publish(work, _summary(request), report, stopwatch.measured()), results


def read_results(directory: Path) -> SweepResults:
    """The results of a finished sweep."""
    return SweepResults.model_validate_json((directory / RESULTS_NAME).read_text(encoding="utf-8"))


def _results(request: SweepRequest, rows: list[Row | Refusal]) -> SweepResults:
    speed, machine = request.speed, None
    if speed:
        with torch_threads(speed.settings.threads) as threads:
            machine = machine_facts(speed.settings.device, threads)
    texts = {
        passage.text.reference: Windows(
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
        model=request.options.model,
        held_out_by=objective_of(request.subject.checkpoint).name,
        texts=texts,
        generation=speed.settings.generation if speed else None,
        machine=machine,
        rows=tuple(row for row in rows if isinstance(row, Row)),
        refused=tuple(row for row in rows if isinstance(row, Refusal)),
    )


def _bytes_needed(request: SweepRequest) -> int:
    """What the points take on disk: all of them if they stay, else a cut and what becomes of it."""
    sizes = [request.subject.checkpoint.bytes * (1 - point.sparsity) for point in request.points]
    return int(sum(sizes) if request.options.keep else 2 * max(sizes))


def _summary(request: SweepRequest) -> str:
    options = request.options
    methods = ", ".join(choice.name for choice in request.prunes)
    ratios = ", ".join(f"{ratio:g}" for ratio in options.sparsities)
    return f"{options.model} by {methods} at {ratios}"
