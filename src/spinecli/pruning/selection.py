"""From scores and an allocation to masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.pruning.allocation import Allocation


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of everything that can leave a checkpoint; higher = keep."""

    influence: Tensor
    """(blocks,) float64."""
    kv_groups: Tensor
    """(blocks, kv_heads) float64."""
    channels: Tensor
    """(blocks, channels) float64."""

    def tensors(self) -> dict[str, Tensor]:
        """By name, for safetensors."""
        return {"influence": self.influence, "kv_groups": self.kv_groups, "channels": self.channels}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Any]) -> Scores:
        """The inverse of `tensors`."""
        return cls(tensors["influence"], tensors["kv_groups"], tensors["channels"])


def select(scores: Scores, allocation: Allocation, shape: BlockShape, protected: frozenset[int]) -> Masks:
    """Keep the most important units of each kept block; remove the least influential unprotected blocks.

    Ties go to the unit with the lower index.
    """
    blocks = len(scores.influence)
    order = torch.argsort(scores.influence, stable=True).tolist()
    removed = [index for index in order if index not in protected][: allocation.removed_blocks]
    if len(removed) < allocation.removed_blocks:
        raise ValueError("more blocks are to leave than are unprotected")
    nothing = BlockMask(torch.zeros(shape.heads, dtype=torch.bool), torch.zeros(shape.channels, dtype=torch.bool))
    masks = []
    for index in range(blocks):
        if index in removed:
            masks.append(nothing)
            continue
        groups = _top(scores.kv_groups[index], allocation.shape.kv_heads)
        channels = _top(scores.channels[index], allocation.shape.channels)
        masks.append(BlockMask(groups.repeat_interleave(shape.group_size), channels))
    return Masks(tuple(masks))


def protected_blocks(blocks: int) -> frozenset[int]:
    """Blocks that stay by default: the first eighth and the last sixteenth, at least one of each.

    For 32 blocks that is 0, 1, 2, 3, 30, 31, the rule known from shortened-llm (recalled, see docs/algorithms/comp.md).
    """
    first, last = max(1, round(blocks / 8)), max(1, round(blocks / 16))
    return frozenset(range(first)) | frozenset(range(blocks - last, blocks))


def _top(scores: Tensor, count: int) -> Tensor:
    """(n,) bool with the `count` highest scores True."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return kept
