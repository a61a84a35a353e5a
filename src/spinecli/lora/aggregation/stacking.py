"""Joining factors of different ranks: stacked, as a product, or padded with zeros.

HETLoRA: factors of different ranks padded with zeros, averaged with weights from the norm of their products.

The device's part is `Factors.truncated`: it receives the first rows of A and columns of B, without any decomposition.
Weights and padding follow third-party HETLoRA aggregators (see docs/algorithms/aggregation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from spinecli.lora.aggregation.averaging import average_factors
from spinecli.lora.aggregation.compression import compress
from spinecli.lora.aggregation.contribution import Contribution, full_shape, projection_names, resized
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


def average_products(contributions: Sequence[Contribution], previous: Adapter, rank: int) -> dict[str, Factors]:
    """The best approximation of rank `rank` to sum w_i B_i A_i, projection by projection over its holders.

    FlexLoRA's truncated decomposition (sourced in product form, see docs/algorithms/aggregation.md), computed from the
    stacked factors and never from the dense matrix. Components come strongest first: a device of rank r is sent
    `truncated(r)`. Projections that nobody holds are returned as they were.
    """
    stacked = stack(contributions, previous)
    names = dict.fromkeys([*previous, *stacked])
    return {name: compress(stacked[name], rank) if name in stacked else previous[name] for name in names}


def product_norm(factors: Factors) -> float:
    """||B A||_F as sqrt(tr(B^T B A A^T)), without the dense product."""
    a, b = factors.a.double(), factors.b.double()
    squared = torch.sum((b.T @ b) * (a @ a.T))
    # Rounding can leave a tiny negative number where the product is zero.
    return float(squared.clamp_min(0).sqrt())


def norm_weights(adapters: Sequence[Adapter]) -> list[float]:
    """w_i = ||B_i A_i||_F summed over the projections, over the same sum of all devices; equal if all are zero."""
    norms = [sum(product_norm(factors) for factors in adapter.values()) for adapter in adapters]
    total = sum(norms)
    return [norm / total for norm in norms] if total > 0 else [1 / len(norms)] * len(norms)


def average_padded(contributions: Sequence[Contribution], previous: Adapter, rank: int) -> dict[str, Factors]:
    """HETLoRA's mean at `rank`: sum w_i A_i and sum w_i B_i over zero-padded factors, w_i from `norm_weights`.

    The contributions' own weights are not used. Weights are normalised over the holders of each projection; projections
    nobody holds, and those held only by devices of weight zero, keep their previous values.

    Args:
        rank: of the global adapter; components beyond it are dropped.
    """
    weights = norm_weights([contribution.adapter for contribution in contributions])
    padded = [
        replace(
            contribution,
            adapter={name: resized(factors, rank) for name, factors in contribution.adapter.items()},
            weight=weight,
        )
        for contribution, weight in zip(contributions, weights, strict=True)
    ]
    return average_factors(padded, previous)
