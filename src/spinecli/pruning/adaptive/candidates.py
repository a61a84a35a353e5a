"""Ways to spend a budget over blocks of differing widths, to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spinecli.pruning.adaptive.allocation import AdaptiveBudget, allocate_adaptively
from spinecli.pruning.adaptive.damage import DamageCurve, Sensitivity, damage_curve, tempered
from spinecli.pruning.scores import Scores
from spinecli.pruning.search import Candidate
from spinecli.pruning.selection import select_shapes

# How far the measured differences between blocks are followed: damages of single cuts do not simply add up.
STRENGTHS = (1.0, 0.7, 0.5)


def adaptive_candidates(
    budget: AdaptiveBudget,
    scores: Scores,
    measured: Mapping[tuple[int, str], Sensitivity],
    removed: Sequence[frozenset[int]],
) -> list[Candidate]:
    """Every strength with every set of blocks that leave as a whole; those that come out alike are named once.

    Args:
        scores: of a method that knows what the loss of units costs.
    """
    curves = damage_curves(budget, scores, measured)
    found: dict[object, Candidate] = {}
    for gone in dict.fromkeys(removed):
        for strength in STRENGTHS:
            allocation = allocate_adaptively(budget, tempered(curves, strength), gone, strength)
            if allocation and any(shape.heads or shape.channels for shape in allocation.shapes):
                masks = select_shapes(scores, allocation.shapes, [costs.dense for costs in budget.costs])
                found.setdefault(allocation.shapes, Candidate(allocation, masks))
    return list(found.values())


def damage_curves(
    budget: AdaptiveBudget, scores: Scores, measured: Mapping[tuple[int, str], Sensitivity]
) -> list[DamageCurve]:
    """Of every sub-layer that a block has.

    Raises: ValueError if the scores come from a method that does not know the units' errors.
    """
    curves = []
    for (block, sub_layer), sensitivity in sorted(measured.items()):
        units, costs = scores.units[block], budget.costs[block]
        attention = sub_layer == "attention"
        errors = units.kv_group_errors if attention else units.channel_errors
        if errors is None:
            raise ValueError("the scores do not say what the loss of units costs")
        unit = costs.kv_group if attention else costs.channel
        curves.append(damage_curve(block, sub_layer, errors, unit, sensitivity))
    return curves
