"""FlexLoRA: the weighted mean of the products, brought back to low rank."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.lora.aggregation.compression import compress
from spinecli.lora.aggregation.contribution import Contribution
from spinecli.lora.aggregation.stacking import stack
from spinecli.lora.factors import Adapter, Factors


def average_products(contributions: Sequence[Contribution], previous: Adapter, rank: int) -> dict[str, Factors]:
    """The best approximation of rank `rank` to sum w_i B_i A_i, projection by projection over its holders.

    FlexLoRA's truncated decomposition (sourced in product form, see docs/algorithms/aggregation.md), computed from the
    stacked factors and never from the dense matrix. Components come strongest first: a device of rank r is sent
    `truncated(r)`. Projections that nobody holds are returned as they were.
    """
    stacked = stack(contributions, previous)
    names = dict.fromkeys([*previous, *stacked])
    return {name: compress(stacked[name], rank) if name in stacked else previous[name] for name in names}
