"""`spine tune` as a library call: dense teacher and pruned student streamed together, answers folded in, published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from spinecli.artifacts.directory import OutputOptions, check_output, require_space
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.objective import Objective, objective_of
from spinecli.calibration.reload import probe, streamed_logits, verify_written
from spinecli.calibration.stream import BlockStream
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.masktuning.block import Lesson, Pupil, tune_block
from spinecli.masktuning.recovery import recover
from spinecli.masktuning.request import TuneRequest
from spinecli.masktuning.tuned_weights import TunedWeights, plan_tuned
from spinecli.masktuning.walk import walk
from spinecli.progress import Progress, silent

SCALES_NAME = "scales.safetensors"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What tuning did to the model as a whole, on calibration rows that nothing was fitted to."""

    objective: Objective
    loss_before: float
    """What the objective says; the lower the better."""
    loss_after: float
    logits: Tensor
    """The tuned student's answers to the probe tokens; see `BlockStream.logits`."""

    @property
    def helps(self) -> bool:
        """Whether the tuned model is the better one."""
        return self.loss_after < self.loss_before

    @property
    def summary(self) -> str:
        """For a person, in a few words."""
        before = f"held-out {self.objective.key} {self.loss_before:.4f}"
        return f"{before} to {self.loss_after:.4f}" if self.helps else f"{before}, left untuned"

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        key = self.objective.key
        return {
            "judged_by": self.objective.name,
            f"held_out_{key}_before": self.loss_before,
            f"held_out_{key}_after": self.loss_after,
            "kept": "tuned" if self.helps else "untuned",
        }


def tune_pass(
    request: TuneRequest,
    tuned: TunedWeights,
    journal: PassJournal | None = None,
    stopwatch: Stopwatch | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Walk teacher and student block by block and leave the answers in `tuned`.

    Three streams are carried: the teacher's, the tuned student's, and, on the held-out rows, that of the student as it
    was, for the final comparison.
    """
    stopwatch = stopwatch or Stopwatch()
    tokens, held_out = request.calibration.tokens, request.held_out_rows
    answer = partial(recover, held_out=held_out * request.calibration.length, method=request.options.method)
    length, compute = request.calibration.length, request.options.compute
    teacher = BlockStream(request.teacher, length, compute, stopwatch)
    student = BlockStream(request.student, length, compute, stopwatch)
    student_index = {dense: index for index, dense in enumerate(request.masks.kept_blocks)}
    streams: dict[str, Tensor] = {}

    def follow(dense: int, lesson: Lesson, _: Sequence[int]) -> None:
        index = student_index[dense]
        with student.block(index) as block:
            streams["as it was"] = student.run(block, streams["as it was"])
            pupil = Pupil(block, streams["student"])
            found = tune_block(student, pupil, lesson, answer, request.student.storage_dtype)
        tuned.save(index, dense, found, request.student)
        streams["student"] = found.hidden

    with stopwatch("computing"):
        streams["student"] = student.embed(tokens)
        streams["as it was"] = streams["student"][-held_out:]
        start = teacher.embed(tokens)
        dense = walk(
            teacher, start, [request.masks], streams, follow, phase="tuning", journal=journal, progress=progress
        )
        objective, judged = objective_of(request.student), slice(-held_out, None)
        before, after = (
            objective.measure(student, hidden[judged], dense[judged], tokens[judged])
            for hidden in (streams["as it was"], streams["student"])
        )
        corner = probe(request.student, streams["student"])
        logits = torch.cat(list(student.logits(corner))).cpu()
    return Outcome(objective, before, after, logits)


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
        tuned = TunedWeights(work.state)
        outcome = tune_pass(request, tuned, PassJournal(work.state, "tuning"), stopwatch, progress)
        with stopwatch("writing"):
            answers, switches = (tuned, request.bias_switches) if outcome.helps else (None, ())
            config, groups = plan_tuned(student, answers, switches)
            write_checkpoint(work.files, config, groups, student.path, progress)
            request.masks.save(work.files)
            if outcome.helps and (scales := tuned.scales(student.blocks)):
                save_file(scales, work.files / SCALES_NAME)
        with stopwatch("verifying"):
            tokens, compute = probe(student, request.calibration.tokens), request.options.compute
            expected = outcome.logits if outcome.helps else streamed_logits(student, tokens, None, compute, stopwatch)
            difference = verify_written(work.files, tokens, expected, compute, stopwatch)
        layers = [layer for index in range(student.blocks) for layer in tuned.report(index)]
        report = {**outcome.report(), "layers": layers, "largest_logit_difference": difference}
        return run.publish(work, f"{request.options.method.value}, {outcome.summary}", report, stopwatch.measured())
