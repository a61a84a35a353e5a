"""`spine tune` as a library call: recover, fold the answers in, prove, publish."""

from __future__ import annotations

from spinecli.artifacts.directory import OutputOptions, check_output, require_space
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.masktuning.recovery_pass import recover_student, recovery_report, verify_recovered, write_recovered
from spinecli.masktuning.request import TuneRequest
from spinecli.masktuning.tuned_weights import TunedWeights
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
        task, tuned = request.task(), TunedWeights(work.state)
        outcome = recover_student(task, tuned, PassJournal(work.state, "tuning"), stopwatch, progress)
        with stopwatch("writing"):
            write_recovered(work.files, task, outcome, tuned, request.bias_switches, progress)
        with stopwatch("verifying"):
            difference = verify_recovered(work.files, task, outcome, stopwatch)
        report = {**recovery_report(task, outcome, tuned), "largest_logit_difference": difference}
        return run.publish(work, f"{request.options.method.value}, {outcome.summary}", report, stopwatch.measured())
