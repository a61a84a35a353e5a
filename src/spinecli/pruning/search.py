"""Choosing between allocations by what matters: the objective on held-out calibration rows after a recovery.

All candidates walk through the dense checkpoint together, each with its own stream. Behind every block each is fitted
as the final cut will be, though to fewer rows: cutting blocks and thinning them hurt differently before a recovery and
after it, so the recovery is part of the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream, LoadedBlock
from spinecli.checkpoints.stream.objective import objective_of
from spinecli.pruning.adaptive.allocation import AdaptiveAllocation
from spinecli.pruning.allocation import Allocation
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery.block import Fit, StudentBlock, TeacherTargets, fit_block
from spinecli.pruning.recovery.recover import held_out_rows
from spinecli.pruning.recovery.walk import walk


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to cut a checkpoint."""

    allocation: Allocation | AdaptiveAllocation
    shapes: tuple[BlockShape, ...]
    """How much is kept of every block; nothing of one that leaves."""
    masks: Masks | None = None
    """Which units that is; None if they are chosen as the candidate is fitted."""

    def student(self, block: LoadedBlock, hidden: Tensor) -> StudentBlock:
        """The candidate's form of a dense block, with the stream that enters it."""
        if self.masks is None:
            return StudentBlock(block, hidden, shape=self.shapes[block.index])
        return StudentBlock(block, hidden, self.masks.blocks[block.index])

    @property
    def kept(self) -> list[bool]:
        """Of every block, whether it stays."""
        return [bool(shape.heads or shape.channels) for shape in self.shapes]


@dataclass(frozen=True)
class CandidateScore:
    """What a candidate is worth."""

    candidate: Candidate
    held_out: float
    """What the checkpoint's objective says of the held-out rows after the recovery; the lower the better."""

    @property
    def allocation(self) -> Allocation | AdaptiveAllocation:
        """How the candidate spends the budget."""
        return self.candidate.allocation


# Tokens that candidates are fitted to, and tokens that they are compared on, where there are so many.
FITTED_TOKENS = 8192
JUDGING_TOKENS = 8192

_RIDGES = (0.03, 0.3)


def search_rows(rows: int, length: int) -> tuple[int, int]:
    """How many of the calibration rows candidates are fitted to, and how many compare them: at most half of all."""
    judging = max(1, min(rows // 2, -(-JUDGING_TOKENS // length)))
    return min(rows - judging, -(-FITTED_TOKENS // length)), judging


def score_candidates(
    stream: BlockStream,
    tokens: Tensor,
    candidates: Sequence[Candidate],
    phase: str,
    context: RunContext | None = None,
) -> list[CandidateScore]:
    """What every candidate is worth, in the given order.

    Args:
        tokens: (rows, length), of which as many are used as `search_rows` says.
        phase: for the progress and the journal.
    """
    context = context or RunContext()
    fitted, judged = search_rows(*tokens.shape)
    tokens = tokens[: fitted + judged]
    fit = candidate_fit(fitted, judged)
    with context.stopwatch("computing"):
        start = stream.embed(tokens)
        streams = {f"candidate {number}": start for number in range(len(candidates))}

        def follow(index: int, targets: TeacherTargets, members: Sequence[int]) -> None:
            with stream.block(index) as block:
                for number in members:
                    name = f"candidate {number}"
                    student = candidates[number].student(block, streams[name])
                    streams[name] = fit_block(stream, student, targets, fit, stream.checkpoint.storage_dtype).hidden

        students = [candidate.kept for candidate in candidates]
        dense = walk(stream, start, students, streams, follow, phase, context)
        last = {name: hidden[-judged:] for name, hidden in streams.items()}
        found = objective_of(stream.checkpoint).measure(stream, last, dense[-judged:])
    return [CandidateScore(each, float(found[name].mean())) for each, name in zip(candidates, streams, strict=True)]


def candidate_fit(fitted: int, judged: int) -> Fit:
    """A recovery with fewer ridges, by an eighth of the rows that are fitted to; the last `judged` rows look on."""
    rows = torch.arange(fitted + judged)
    choosing = held_out_rows(fitted)
    return Fit(
        fitting=rows < fitted - choosing,
        judging=(rows >= fitted - choosing) & (rows < fitted),
        method=TuneMethod.lsq,
        ridges=_RIDGES,
    )
