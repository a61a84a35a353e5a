"""`spine tune` as a library call: recover, fold the answers in, prove, publish."""

from __future__ import annotations

from spinecli.artifacts.directory import OutputOptions, check_output, require_space
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.masktuning.recovery_pass import recover_into
from spinecli.masktuning.request import TuneRequest
from spinecli.progress import Progress, silent


def tune(
    request: TuneRequest, output: OutputOptions, stopwatch: Stopwatch | None = None, progress: Progress = silent
) -> Manifest:
    """Tune a pruned checkpoint into a new directory.

    If the tuned model as a whole is worse than the untuned one on held-out rows, the weights stay as they were and the
    report says so.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, and what reading can raise.
    """
    stopwatch = stopwatch or Stopwatch()
    student = request.student
    run = Run(
        kind="tuned-checkpoint",
        command="tune",
        parameters=request.parameters(),
        seed=request.options.seed,
        inputs=request.inputs,
        lineage=request.lineage,
    )
    if finished := run.finished(output):
        return finished
    check_output(output, [student.path, request.teacher.path])
    require_space(output.path.parent, student.bytes)
    with run.working(output) as work:
        found = recover_into(work, request.task(), request.bias_switches, stopwatch, progress)
        summary = f"{request.options.method.value}, {found.outcome.summary}"
        report = {**found.report, "largest_logit_difference": found.largest_logit_difference}
        return run.publish(work, summary, report, stopwatch.measured())
