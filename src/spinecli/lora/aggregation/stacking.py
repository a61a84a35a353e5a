"""FLoRA: stacked factors, whose product is exactly the weighted mean of the products at any ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spinecli.lora.aggregation.contribution import Contribution, full_shape, projection_names
from spinecli.lora.factors import Adapter, Factors


def sum_of_products(parts: Sequence[Factors]) -> Factors:
    """Factors whose product is the sum of the parts' products; the rank is the sum of the ranks."""
    return Factors(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1))


def stack(contributions: Sequence[Contribution], previous: Adapter) -> dict[str, Factors]:
    """The exact weighted mean of the products, projection by projection over its holders.

        B = [B_1 .. B_K],    A = [w_1 A_1; ..; w_K A_K],    B A = sum w_i B_i A_i,    sum w_i = 1

    Units that a device has lost count as zeros; `coverage` is the rule that leaves them out of the mean.

    Args:
        contributions: in a fixed order, which is the order of the components.
        previous: for the full shapes; projections that nobody holds are absent from the result.
    """
    stacked = {}
    for name in projection_names(contributions, {}):
        holders = [contribution for contribution in contributions if name in contribution.adapter]
        shape, total = full_shape(name, holders, previous), sum(holder.weight for holder in holders)
        if total <= 0:
            continue
        parts = [(holder.embedded(name, shape), holder.weight / total) for holder in holders]
        stacked[name] = sum_of_products([Factors(part.a * weight, part.b) for part, weight in parts])
    return stacked
