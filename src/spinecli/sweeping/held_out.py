"""One figure that every kind of model has: the objective on calibration rows that recovery is not fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.objective import Objective, objective_of
from spinecli.calibration.stream import BlockStream, ComputeOptions
from spinecli.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The rows, and what the dense model makes of them."""

    objective: Objective
    tokens: Tensor
    """(rows, length)."""
    dense: Tensor
    """(rows, length, d_model): the dense model's hidden states behind its last block."""
    compute: ComputeOptions
    stopwatch: Stopwatch
    opening: int
    """Special tokens in front of every row."""

    def measure(self, checkpoint: Checkpoint) -> float:
        """The objective of a checkpoint with the dense one's vocabulary and width; the lower the better."""
        stream = BlockStream(checkpoint, self.tokens.shape[1], self.compute, self.stopwatch, self.opening)
        with self.stopwatch("computing"):
            return self.objective.measure(stream, behind_the_blocks(stream, self.tokens), self.dense, self.tokens)


def hold_out(
    dense: Checkpoint, tokens: Tensor, compute: ComputeOptions, stopwatch: Stopwatch, opening: int = 0
) -> HeldOut:
    """Run the dense model on the rows: tokens (rows, length), the first `opening` of each row special ones."""
    stream = BlockStream(dense, tokens.shape[1], compute, stopwatch)
    with stopwatch("computing"):
        return HeldOut(objective_of(dense), tokens, behind_the_blocks(stream, tokens), compute, stopwatch, opening)


def behind_the_blocks(stream: BlockStream, tokens: Tensor) -> Tensor:
    """Hidden states behind the last block: tokens (rows, length) -> (rows, length, d_model)."""
    hidden = stream.embed(tokens)
    for index in range(stream.blocks):
        with stream.block(index) as block:
            hidden = stream.run(block, hidden)
    return hidden
