"""HETLoRA: factors of different ranks padded with zeros, averaged with weights from the norm of their products.

The device's part is `Factors.truncated`: it receives the first rows of A and columns of B, without any decomposition.
Weights and padding follow third-party HETLoRA aggregators (see docs/algorithms/aggregation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from spinecli.lora.aggregation.averaging import average_factors
from spinecli.lora.aggregation.contribution import Contribution, resized
from spinecli.lora.factors import Adapter, Factors


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
