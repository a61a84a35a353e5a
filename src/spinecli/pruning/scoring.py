"""The scoring pass: one walk of the dense checkpoint's block stream, in which the method sees every block once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.stream.observation import observed
from spinecli.pruning.method import BlockInfluence, BlockView, InputStatistics, Method, UnitScores


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of everything that can leave a checkpoint; higher = keep."""

    influence: Tensor
    """(blocks,) float64."""
    units: tuple[UnitScores, ...]
    """Of every block."""

    def tensors(self) -> dict[str, Tensor]:
        """By name, for safetensors."""
        found = {"influence": self.influence}
        for index, units in enumerate(self.units):
            found |= named(index, units)
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Scores:
        """The inverse of `tensors`."""
        influence = tensors["influence"]
        names = [field.name for field in fields(UnitScores)]
        units = (
            UnitScores(**{name: tensors[key] for name in names if (key := f"block.{index}.{name}") in tensors})
            for index in range(len(influence))
        )
        return cls(influence, tuple(units))


def named(index: int, units: UnitScores) -> dict[str, Tensor]:
    """A block's scores by name; what is unknown is left out."""
    found = {field.name: getattr(units, field.name) for field in fields(units)}
    return {f"block.{index}.{name}": value for name, value in found.items() if value is not None}


def score_checkpoint(stream: BlockStream, tokens: Tensor, method: Method, context: RunContext | None = None) -> Scores:
    """Scores of every block, KV group and channel.

    Args:
        tokens: (rows, length) calibration tokens.
    """
    context, checkpoint = context or RunContext(), stream.checkpoint
    journal = context.journal("scoring")
    found: dict[str, Tensor] = {"influence": torch.zeros(stream.blocks, dtype=torch.float64)}
    with context.stopwatch("computing"):
        hidden = stream.embed(tokens)
        first = 0
        if journal and (saved := journal.load()):
            first = saved.finished
            hidden = saved.tensors.pop("hidden").to(hidden.device)
            found = saved.tensors
        for index in range(first, stream.blocks):
            with stream.block(index) as block:
                family, shape = checkpoint.family, checkpoint.shapes[index]
                attention = InputStatistics(shape.heads * shape.head_dim, gram=method.needs_gram)
                feed_forward = InputStatistics(shape.channels, gram=method.needs_gram)
                influence = BlockInfluence()
                listeners = {
                    family.attention.output: attention.observe,
                    family.feed_forward.output: feed_forward.observe,
                }
                with observed(block, listeners):
                    after = stream.run(block, hidden)
                for before_row, after_row in zip(hidden, after, strict=True):
                    influence.observe(before_row, after_row)
                units = method.score(BlockView(block, family, shape, attention, feed_forward))
            found["influence"][index] = influence.value
            found |= named(index, units)
            hidden = after
            if journal:
                journal.save(index + 1, {**found, "hidden": hidden}, last=index + 1 == stream.blocks)
            context.progress("scoring blocks", index + 1, stream.blocks)
    return Scores.from_tensors(found)
