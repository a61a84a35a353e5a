"""From scores and an allocation to masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.pruning.allocation import Allocation
from spinecli.pruning.scoring import Scores


def select(scores: Scores, allocation: Allocation, shape: BlockShape, protected: frozenset[int]) -> Masks:
    """Keep the most important units of each kept block; remove the least influential unprotected blocks.

    Ties go to the unit with the lower index.
    """
    removed = least_influential(scores, allocation.removed_blocks, protected)
    nothing = BlockShape(0, 0, shape.head_dim, 0)
    blocks = len(scores.influence)
    after = [nothing if index in removed else allocation.shape for index in range(blocks)]
    return select_shapes(scores, after, (shape,) * blocks)


def select_shapes(scores: Scores, after: Sequence[BlockShape], before: Sequence[BlockShape]) -> Masks:
    """Keep the most important units of every block, as many as `after` says; one without any is removed."""
    masks = []
    for index, (wanted, shape) in enumerate(zip(after, before, strict=True)):
        groups = _top(scores.units[index].kv_groups, wanted.kv_heads)
        masks.append(
            BlockMask(groups.repeat_interleave(shape.group_size), _top(scores.units[index].channels, wanted.channels))
        )
    return Masks(tuple(masks))


def least_influential(scores: Scores, count: int, protected: frozenset[int]) -> frozenset[int]:
    """The `count` unprotected blocks with the least influence; ValueError if there are not so many."""
    order = torch.argsort(scores.influence, stable=True).tolist()
    removed = [index for index in order if index not in protected][:count]
    if len(removed) < count:
        raise ValueError("more blocks are to leave than are unprotected")
    return frozenset(removed)


def protected_blocks(blocks: int) -> frozenset[int]:
    """Blocks that stay by default: the first eighth and the last sixteenth, at least one of each.

    For 32 blocks that is 0, 1, 2, 3, 30, 31, the rule known from shortened-llm (recalled, see docs/algorithms/comp.md).
    """
    first, last = max(1, round(blocks / 8)), max(1, round(blocks / 16))
    return frozenset(range(first)) | frozenset(range(blocks - last, blocks))


def last_of_their_kind(influence: Tensor, kinds: Sequence[str], protected: frozenset[int]) -> dict[int, str]:
    """Blocks that stay so that no kind of attention leaves the model: the most influential one of every kind of which
    none is protected.

    Args:
        influence: (blocks,).
        kinds: of every block.

    Returns: block -> its kind.
    """
    covered = {kinds[index] for index in protected}
    order = torch.argsort(influence, descending=True, stable=True).tolist()
    found: dict[str, int] = {}
    for index in order:
        if kinds[index] not in covered:
            found.setdefault(kinds[index], index)
    return {index: kind for kind, index in sorted(found.items(), key=lambda item: item[1])}


def _top(scores: Tensor, count: int) -> Tensor:
    """(n,) bool with the `count` highest scores True."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return kept
