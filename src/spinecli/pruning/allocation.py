"""How a budget is split between blocks, heads and channels when every kept block has the same shape.

The budget is counted in block parameters. Blocks and heads are coarse, so they are set first; the channels fill what is
left, which lands the total within one step of `round_to` channels of what was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from pydantic import JsonValue
from torch import Tensor

from spinecli.checkpoints.counting import BlockCosts
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import OptionError
from spinecli.pruning.scoring import Scores


def shapes_after(scores: Scores, allocation: Allocation, protected: frozenset[int]) -> tuple[BlockShape, ...]:
    """What is to be kept of every block: nothing of the least influential unprotected ones, and of the others alike."""
    removed = least_influential(scores, allocation.removed_blocks, protected)
    nothing = BlockShape(0, 0, allocation.shape.head_dim, 0)
    return tuple(nothing if index in removed else allocation.shape for index in range(len(scores.influence)))


def select_shapes(scores: Scores, after: Sequence[BlockShape], before: Sequence[BlockShape]) -> Masks:
    """Keep the most important units of every block, as many as `after` says; one without any is removed.

    Ties go to the unit with the lower index.
    """
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


@dataclass(frozen=True)
class Budget:
    """What is to be cut, and what may be."""

    sparsity: float
    """Share of block parameters to remove, between 0 and 1."""
    blocks: int
    removable_blocks: int
    costs: BlockCosts
    kv_heads: tuple[int, ...]
    """Kept KV heads per block that the plain format can express, falling."""
    round_to: int
    """Kept channels are a multiple of this, unless all are kept."""

    @property
    def parameters(self) -> float:
        """Block parameters to remove."""
        return self.sparsity * self.blocks * self.costs.block

    @property
    def most_blocks(self) -> int:
        """Blocks that may leave: at least one stays, protected or not."""
        return min(self.removable_blocks, self.blocks - 1)


@dataclass(frozen=True)
class Allocation:
    """One way to spend the budget."""

    removed_blocks: int
    shape: BlockShape
    """Of every kept block."""
    sparsity: float
    """Achieved share of block parameters removed."""

    def __str__(self) -> str:
        return f"{self.removed_blocks} blocks out, then {self.shape}"

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {"widths": "uniform", "removed_blocks": self.removed_blocks, "shape": asdict(self.shape)}


def allocate(budget: Budget, removed_blocks: int, kv_heads: int) -> Allocation | None:
    """Fill the budget with channels after blocks and KV heads are gone; None if it cannot be met."""
    costs, dense = budget.costs, budget.costs.dense
    kept_blocks = budget.blocks - removed_blocks
    if kept_blocks < 1:
        return None
    per_block = (budget.parameters - removed_blocks * costs.block) / kept_blocks
    leaving = (per_block - (dense.kv_heads - kv_heads) * costs.kv_group) / costs.channel
    tolerance = min(budget.round_to, dense.channels) / 2
    if not -tolerance <= leaving <= dense.channels - min(budget.round_to, dense.channels) + tolerance:
        return None
    channels = _rounded(dense.channels - leaving, dense.channels, budget.round_to)
    return _allocation(budget, removed_blocks, kv_heads, channels)


def allocate_blocks(budget: Budget) -> Allocation:
    """Spend the budget on whole blocks alone, as near as it gets; OptionError if the protected blocks forbid it."""
    removed = round(budget.sparsity * budget.blocks)
    if removed > budget.most_blocks:
        raise OptionError(
            f"Sparsity {budget.sparsity:g} by blocks alone would remove {removed} of {budget.blocks} blocks, and only "
            f"{budget.most_blocks} may be removed; lower --sparsity or name fewer --protect."
        )
    dense = budget.costs.dense
    return _allocation(budget, removed, dense.kv_heads, dense.channels)


def allocate_share(budget: Budget, block_share: float, *, blocks_leave: bool = True) -> Allocation:
    """Spend `block_share` of the budget on blocks, the rest on heads and channels alike.

    Args:
        blocks_leave: whether the method removes blocks at all, so that another share would be a way out.

    Raises: OptionError if no head count meets the budget.
    """
    removed = min(round(block_share * budget.sparsity * budget.blocks), budget.most_blocks)
    if allocation := allocate_heads(budget, removed, 1.0):
        return allocation
    raise OptionError(
        f"Sparsity {budget.sparsity:g} cannot be met with {removed} of {budget.blocks} blocks removed; "
        f"{', or '.join(_ways_out(budget, removed, blocks_leave, block_share < 1))}."
    )


def _ways_out(budget: Budget, removed: int, blocks_leave: bool, raisable: bool) -> list[str]:
    """What would help, each tried; `raisable`: the share of blocks is not yet all."""
    most = min(round(budget.sparsity * budget.blocks), budget.most_blocks)
    ways = ["lower --sparsity"]
    if allocate_heads(replace(budget, round_to=1), removed, 1.0):
        ways.append("lower --round-to")
    if blocks_leave and any(allocate_heads(budget, count, 1.0) for count in range(removed + 1, most + 1)):
        ways.append("raise --block-share so that more whole blocks leave")
    if blocks_leave and any(allocate_heads(budget, count, 1.0) for count in range(removed)):
        ways.append("lower --block-share so that fewer whole blocks leave")
    unprotected = replace(budget, removable_blocks=budget.blocks)
    every = min(round(budget.sparsity * budget.blocks), unprotected.most_blocks)
    if blocks_leave and any(allocate_heads(unprotected, count, 1.0) for count in range(most + 1, every + 1)):
        ways.append(
            f"{'raise --block-share and ' if raisable else ''}name fewer --protect so that more blocks may leave"
        )
    return ways


def allocate_heads(budget: Budget, removed_blocks: int, head_factor: float) -> Allocation | None:
    """Remove blocks, then heads, then fill up with channels; None if no head count meets the budget.

    Args:
        head_factor: share of heads removed over share of neurons removed; the nearest feasible count is taken.
    """
    dense = budget.costs.dense
    kept_blocks = budget.blocks - removed_blocks
    ratio = (budget.sparsity * budget.blocks - removed_blocks) / kept_blocks
    wanted = dense.kv_heads * (1 - head_factor * ratio)
    by_distance = sorted(budget.kv_heads, key=lambda count: (abs(count - wanted), -count))
    feasible = (allocate(budget, removed_blocks, kv_heads) for kv_heads in by_distance)
    return next((allocation for allocation in feasible if allocation), None)


def block_candidates(budget: Budget, shares: Sequence[float]) -> list[Allocation]:
    """Allocations that differ in how many blocks leave, fewest first, with all heads if channels are enough.

    Args:
        shares: of the budget, spent on blocks.

    Raises: OptionError if there is none.
    """
    counts = {min(round(share * budget.sparsity * budget.blocks), budget.most_blocks) for share in shares}
    found = [allocate_heads(budget, count, 0.0) for count in sorted(counts)]
    return [allocation for allocation in found if allocation] or [allocate_share(budget, 1.0)]


def head_candidates(budget: Budget, start: Allocation, factors: Sequence[float]) -> list[Allocation]:
    """Allocations with the blocks of `start` and other head counts.

    Args:
        factors: share of heads removed over share of neurons removed.
    """
    found = [allocate_heads(budget, start.removed_blocks, factor) for factor in factors]
    return list(dict.fromkeys(allocation for allocation in found if allocation and allocation != start))


def _rounded(wanted: float, dense: int, round_to: int) -> int:
    """The multiple of `round_to` nearest to `wanted`, or all of them, whichever is nearer."""
    multiple = min(max(round(wanted / round_to), 1) * round_to, dense - dense % round_to)
    return dense if abs(dense - wanted) <= abs(multiple - wanted) or multiple == 0 else multiple


def _allocation(budget: Budget, removed_blocks: int, kv_heads: int, channels: int) -> Allocation:
    dense = budget.costs.dense
    shape = BlockShape(kv_heads * dense.group_size, kv_heads, dense.head_dim, channels)
    kept = (budget.blocks - removed_blocks) * budget.costs.parameters(shape)
    return Allocation(removed_blocks, shape, 1 - kept / (budget.blocks * budget.costs.block))
