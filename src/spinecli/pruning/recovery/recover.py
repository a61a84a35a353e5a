"""Recovering a student: dense teacher and pruned student streamed together, one answer a projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from spinecli.artifacts.directory import WorkDirectory
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.stream.block_stream import BlockStream, ComputeOptions
from spinecli.checkpoints.stream.objective import Objective, objective_of
from spinecli.checkpoints.stream.verify import probe, streamed_logits, verify_written
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.progress import Progress, silent
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery.block import StudentBlock, TeacherTargets, tune_block
from spinecli.pruning.recovery.gated_layer import BranchTuning
from spinecli.pruning.recovery.least_squares import recover
from spinecli.pruning.recovery.tuned_weights import TunedWeights, tuned_checkpoint
from spinecli.pruning.recovery.walk import walk

SCALES_NAME = "scales.safetensors"


@dataclass(frozen=True, eq=False)
class RecoveryOutcome:
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


@dataclass(frozen=True, eq=False)
class RecoveryTask:
    """Who is to be recovered, and from what."""

    teacher: Checkpoint
    student: Checkpoint
    masks: Masks
    """What the student keeps of the teacher."""
    tokens: Tensor
    """(rows, length)."""
    held_out_rows: int
    """Rows at the end that choose between answers and are not fitted to."""
    method: TuneMethod
    compute: ComputeOptions
    opening: int = 0
    """Special tokens in front of every row."""


def held_out_rows(rows: int) -> int:
    """How many of the calibration rows choose between answers: an eighth."""
    return max(1, rows // 8)


def recover_student(
    task: RecoveryTask,
    tuned: TunedWeights,
    journal: PassJournal | None = None,
    stopwatch: Stopwatch | None = None,
    progress: Progress = silent,
) -> RecoveryOutcome:
    """Walk teacher and student block by block and leave the answers in `tuned`.

    Three streams are carried: the teacher's, the tuned student's, and, on the held-out rows, that of the student as it
    was, for the final comparison.
    """
    stopwatch = stopwatch or Stopwatch()
    tokens, held_out, length = task.tokens, task.held_out_rows, task.tokens.shape[1]
    answer = partial(recover, held_out=held_out * length, method=task.method)
    branches = BranchTuning(held_out * length) if task.method is TuneMethod.auto else None
    teacher = BlockStream(task.teacher, length, task.compute, stopwatch, task.opening)
    student = BlockStream(task.student, length, task.compute, stopwatch, task.opening)
    student_index = {dense: index for index, dense in enumerate(task.masks.kept_blocks)}
    streams: dict[str, Tensor] = {}

    def follow(dense: int, targets: TeacherTargets, _: Sequence[int]) -> None:
        index = student_index[dense]
        with student.block(index) as block:
            streams["as it was"] = student.run(block, streams["as it was"])
            student_block = StudentBlock(block, streams["student"])
            found = tune_block(student, student_block, targets, answer, task.student.storage_dtype, branches)
        tuned.save(index, dense, found, task.student)
        streams["student"] = found.hidden

    with stopwatch("computing"):
        streams["student"] = student.embed(tokens)
        streams["as it was"] = streams["student"][-held_out:]
        start = teacher.embed(tokens)
        dense = walk(teacher, start, [task.masks], streams, follow, phase="tuning", journal=journal, progress=progress)
        objective, judged = objective_of(task.student), slice(-held_out, None)
        before, after = (
            objective.measure(student, hidden[judged], dense[judged], tokens[judged])
            for hidden in (streams["as it was"], streams["student"])
        )
        corner = probe(task.student, streams["student"])
        logits = torch.cat(list(student.logits(corner))).cpu()
    return RecoveryOutcome(objective, before, after, logits)


@dataclass(frozen=True, eq=False)
class Recovered:
    """A recovery that is written and proved."""

    outcome: RecoveryOutcome
    report: dict[str, JsonValue]
    """For `spine.json` and --json: what it did to the model, and to each layer."""
    largest_logit_difference: float
    """Between the written checkpoint and the intended one."""


def recover_into(
    work: WorkDirectory,
    task: RecoveryTask,
    switches: tuple[str, ...],
    stopwatch: Stopwatch,
    progress: Progress = silent,
) -> Recovered:
    """Write the recovered student, or the student as it was if the recovery did not help, with masks and scales.

    Args:
        switches: config keys that turn on biases which the answers bring.

    Raises: NoSpaceError; VerificationError, and then the checkpoint must not be published.
    """
    tuned = TunedWeights(work.state)
    outcome = recover_student(task, tuned, PassJournal(work.state, "tuning"), stopwatch, progress)
    found = tuned_checkpoint(task.student, tuned, switches) if outcome.helps else task.student
    with stopwatch("writing"):
        write_checkpoint(work.files, found.raw_config, found.groups(), found.path, progress)
        task.masks.save(work.files)
        if outcome.helps and (scales := tuned.scales(task.student.blocks)):
            save_file(scales, work.files / SCALES_NAME)
    with stopwatch("verifying"):
        tokens, logits = probe(task.student, task.tokens), outcome.logits
        if not outcome.helps:
            logits = streamed_logits(task.student, tokens, None, task.compute, stopwatch)
        difference = verify_written(work.files, tokens, logits, task.compute, stopwatch)
    layers = [layer for index in range(task.student.blocks) for layer in tuned.report(index)]
    return Recovered(outcome, {**outcome.report(), "layers": layers}, difference)
