"""Choosing between allocations by what matters: the objective on held-out calibration rows after a recovery.

All candidates walk through the dense checkpoint together. Each carries its own stream and its own masks, and is
recovered block by block by a ridge re-fit of its output projections: cutting blocks and thinning them hurt differently
before a recovery and after it, so the recovery is part of the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.cutting import head_rows
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.stream.block_stream import BlockStream, LoadedBlock
from spinecli.checkpoints.stream.objective import objective_of
from spinecli.pruning.adaptive.allocation import AdaptiveAllocation
from spinecli.pruning.allocation import Allocation
from spinecli.pruning.recovery.block import StudentBlock, TeacherTargets, projections, tune_block
from spinecli.pruning.recovery.least_squares import recover_quickly
from spinecli.pruning.recovery.walk import walk


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to cut a checkpoint."""

    allocation: Allocation | AdaptiveAllocation
    masks: Masks


@dataclass(frozen=True)
class CandidateScore:
    """What a candidate is worth."""

    candidate: Candidate
    loss: float
    """What the checkpoint's objective says of the held-out rows after the recovery; the lower the better."""

    @property
    def allocation(self) -> Allocation | AdaptiveAllocation:
        """How the candidate spends the budget."""
        return self.candidate.allocation


def score_candidates(
    stream: BlockStream,
    tokens: Tensor,
    held_out_rows: int,
    candidates: Sequence[Candidate],
    phase: str,
    context: RunContext | None = None,
) -> list[CandidateScore]:
    """What every candidate is worth, in the given order.

    Args:
        tokens: (rows, length); the last `held_out_rows` rows judge and are not fitted to.
        phase: for the progress and the journal.
    """
    context = context or RunContext()
    with context.stopwatch("computing"):
        start = stream.embed(tokens)
        streams = {f"candidate {number}": start for number in range(len(candidates))}

        def follow(index: int, targets: TeacherTargets, members: Sequence[int]) -> None:
            with stream.block(index) as block:
                for number in members:
                    name, masks = f"candidate {number}", candidates[number].masks
                    streams[name] = recovered(stream, block, targets, masks, streams[name], held_out_rows)

        students = [candidate.masks for candidate in candidates]
        dense = walk(stream, start, students, streams, follow, phase, context)
        judged = slice(-held_out_rows, None)
        measure = objective_of(stream.checkpoint).measure
        losses = [measure(stream, hidden[judged], dense[judged], tokens[judged]) for hidden in streams.values()]
    return [CandidateScore(candidate, loss) for candidate, loss in zip(candidates, losses, strict=True)]


def recovered(
    stream: BlockStream, block: LoadedBlock, targets: TeacherTargets, masks: Masks, hidden: Tensor, held_out_rows: int
) -> Tensor:
    """A candidate's stream behind a block that it keeps; the block's weights are put back."""
    mask = masks.blocks[block.index]
    answer = partial(recover_quickly, held_out=held_out_rows * stream.length)
    dense = [block.linear(name) for name in projections(stream.checkpoint.family)]
    originals = [(linear.weight, linear.bias) for linear in dense]
    heads = head_rows(mask.heads, stream.checkpoint.shapes[block.index].head_dim).to(hidden.device)
    channels = mask.channels.nonzero().flatten().to(hidden.device)
    try:
        student_block = StudentBlock(block, hidden, heads, channels)
        return tune_block(stream, student_block, targets, answer, stream.checkpoint.storage_dtype).hidden
    finally:
        for linear, (weight, bias) in zip(dense, originals, strict=True):
            linear.weight, linear.bias = weight, bias
