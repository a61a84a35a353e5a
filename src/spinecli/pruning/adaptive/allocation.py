"""Spending a budget over blocks of differing widths, where it is expected to cost least.

Every sub-layer offers its units in the segments of its damage curve's lower convex hull; the cheapest damage per
parameter is taken until the budget is met. Per segment that is the optimum of the sum of the curves (Lagrange); the
last one is taken in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from pydantic import JsonValue

from spinecli.checkpoints.counting import BlockCosts
from spinecli.checkpoints.shape import BlockShape
from spinecli.pruning.adaptive.damage import DamageCurve, lower_hull


@dataclass(frozen=True)
class AdaptiveBudget:
    """What is to be cut, and what may be."""

    sparsity: float
    """Share of block parameters to remove, between 0 and 1."""
    costs: Sequence[BlockCosts]
    """Of every block."""
    round_to: int
    """Kept channels are a multiple of this, unless all or none are kept."""
    protected: frozenset[int]
    """Blocks whose sub-layers stay, however narrow."""
    heads_leave: bool

    @property
    def whole(self) -> int:
        """All block parameters."""
        return sum(costs.block for costs in self.costs)


@dataclass(frozen=True)
class AdaptiveAllocation:
    """One way to spend the budget."""

    shapes: tuple[BlockShape, ...]
    """Of every block, 0 heads or channels where that sub-layer is removed."""
    sparsity: float
    """Achieved share of block parameters removed."""
    strength: float
    """How far the blocks' differences were followed; see `damage.tempered`."""

    @property
    def removed_blocks(self) -> int:
        """Blocks that leave as a whole."""
        return sum(not shape.heads and not shape.channels for shape in self.shapes)

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            "widths": "adaptive",
            "strength": self.strength,
            "removed_blocks": self.removed_blocks,
            "shapes": [asdict(shape) for shape in self.shapes],
        }


@dataclass(frozen=True)
class _Segment:
    price: float
    """Damage per parameter."""
    block: int
    sub_layer: str
    start: int
    stop: int
    """Units that have left before and after it."""


def allocate_adaptively(
    budget: AdaptiveBudget, curves: Sequence[DamageCurve], removed: frozenset[int], strength: float
) -> AdaptiveAllocation | None:
    """Fill the budget after the blocks `removed` are gone; None if the floors forbid it."""
    gone = {(curve.block, curve.sub_layer): 0 for curve in curves}
    for curve in curves:
        if curve.block in removed:
            gone[curve.block, curve.sub_layer] = curve.units
    wanted = budget.sparsity * budget.whole
    by_name = {(curve.block, curve.sub_layer): curve for curve in curves}
    smallest = budget.round_to * min(costs.channel for costs in budget.costs if costs.channel)
    for segment in _segments(budget, curves, removed):
        left = wanted - _spent(budget, gone)
        if left < smallest / 2:
            break
        key = segment.block, segment.sub_layer
        if gone[key] != segment.start:
            continue  # the curve's cheaper segment was taken in part
        gone[key] = segment.stop
        if _spent(budget, gone) > wanted:
            gone[key] = _part(segment, left, by_name[key].unit, budget.round_to, by_name[key].units)
    shapes = tuple(_shape(costs.dense, index, gone) for index, costs in enumerate(budget.costs))
    sparsity = _spent(budget, gone) / budget.whole
    step = budget.round_to * max(costs.channel for costs in budget.costs)
    if abs(wanted - sparsity * budget.whole) > step:
        return None
    return AdaptiveAllocation(shapes, sparsity, strength)


def _segments(budget: AdaptiveBudget, curves: Sequence[DamageCurve], removed: frozenset[int]) -> list[_Segment]:
    """All that may leave, the cheapest first; of equals, the lower block."""
    found = []
    for curve in curves:
        if curve.block in removed or (curve.sub_layer == "attention" and not budget.heads_leave):
            continue
        for start, stop in pairwise(lower_hull(curve.damage, _steps(budget, curve))):
            price = float(curve.damage[stop] - curve.damage[start]) / ((stop - start) * curve.unit)
            found.append(_Segment(price, curve.block, curve.sub_layer, start, stop))
    return sorted(found, key=lambda segment: (segment.price, segment.block, segment.sub_layer))


def _steps(budget: AdaptiveBudget, curve: DamageCurve) -> list[int]:
    """How many units may leave a sub-layer."""
    # the cache of keys and values counts its length in block 0, which must keep its attention
    stays = curve.block in budget.protected or (curve.block == 0 and curve.sub_layer == "attention")
    if curve.sub_layer == "attention":
        return list(range(curve.units + (not stays)))
    kept = range(curve.units - curve.units % budget.round_to, 0, -budget.round_to)
    leaving = [curve.units - each for each in kept]
    return sorted({0, *leaving} | (set() if stays else {curve.units}))


def _part(segment: _Segment, left: float, unit: int, round_to: int, units: int) -> int:
    """How many units have left when `left` parameters of a segment are taken, to the nearest step."""
    stop = segment.start + round(left / unit)
    if segment.sub_layer == "attention":
        return min(max(segment.start + int(left // unit), segment.start), segment.stop)
    kept = round((units - stop) / round_to) * round_to
    return min(max(units - kept, segment.start), segment.stop)


def _spent(budget: AdaptiveBudget, gone: Mapping[tuple[int, str], int]) -> int:
    """Parameters that have left."""
    return sum(
        costs.block - costs.parameters(_shape(costs.dense, index, gone)) for index, costs in enumerate(budget.costs)
    )


def _shape(dense: BlockShape, index: int, gone: Mapping[tuple[int, str], int]) -> BlockShape:
    groups = dense.kv_heads - gone.get((index, "attention"), 0)
    channels = dense.channels - gone.get((index, "mlp"), 0)
    return BlockShape(groups * dense.group_size, groups, dense.head_dim, channels)
