"""Joining factors of different ranks: stacked, as a product, or padded with zeros.

HETLoRA: factors of different ranks padded with zeros, averaged with weights from the norm of their products.

The device's part is `Factors.truncated`: it receives the first rows of A and columns of B, without any decomposition.
Weights and padding follow third-party HETLoRA aggregators (see docs/algorithms/aggregation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.lora.aggregation.averaging import average_factors
from spinecli.lora.aggregation.contribution import Contribution, full_shape, projection_names, resized
from spinecli.lora.factors import Adapter, Factors

_COMPLETION_SEED = 0


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular value decomposition of a product of factors, in float64."""

    left: Tensor
    """(d_out, m), orthonormal columns."""
    values: Tensor
    """(m,), falling; exactly 0 where the product has no more rank than rounding."""
    right: Tensor
    """(m, d_in), orthonormal rows; the entry of largest magnitude in each is positive."""

    def lost_share(self, rank: int) -> float:
        """Share of the product's squared Frobenius norm that factors of `rank` lose; 0 for a product of zero."""
        energy = self.values.square()
        total = float(energy.sum())
        return float(energy[rank:].sum()) / total if total > 0 else 0.0

    def factors(self, rank: int) -> Factors:
        """The best approximation with exactly `rank` components, strongest first, in float32.

            B = U S,    A = V^T

        A component of singular value 0 has a zero column in B and a unit row in A orthogonal to all others: with both
        zero, no gradient would ever reach it. Only rows beyond d_in, which no orthogonal direction is left for, are
        zero.
        """
        kept = min(rank, len(self.values))
        d_out, d_in = self.left.shape[0], self.right.shape[1]
        values, right = self.values[:kept], self.right[:kept]
        a = torch.zeros(rank, d_in, dtype=torch.float64, device=right.device)
        b = torch.zeros(d_out, rank, dtype=torch.float64, device=right.device)
        a[:kept] = right
        b[:, :kept] = self.left[:, :kept] * values
        if (missing := min(rank, d_in) - kept) > 0:
            a[kept : kept + missing] = _orthogonal_rows(right, missing)
        return Factors(a.float(), b.float())


def decompose(factors: Factors) -> Spectrum:
    """The singular value decomposition of B A, by QR of both factors and a decomposition of the small core."""
    left, left_core = torch.linalg.qr(factors.b.double())
    right, right_core = torch.linalg.qr(factors.a.double().T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    left, right = left @ u, v @ right.T
    smallest = max(left.shape[0], right.shape[1]) * torch.finfo(torch.float64).eps
    values = torch.where(values > smallest * values[:1], values, 0.0)
    # A component's sign is free; without a rule, the routine's build would decide about the bytes.
    signs = right.gather(1, right.abs().argmax(dim=1, keepdim=True)).squeeze(1).sign()
    return Spectrum(left * signs, values, right * signs.unsqueeze(1))


def compress(factors: Factors, rank: int) -> Factors:
    """The best approximation of B A with exactly `rank` components (Eckart and Young); see `Spectrum.factors`.

    Exact up to rounding where the product has no higher rank. Components are ordered by strength, so that `truncated`
    is again the best approximation of its rank.
    """
    return decompose(factors).factors(rank)


def _orthogonal_rows(rows: Tensor, count: int) -> Tensor:
    """`count` orthonormal rows orthogonal to the given orthonormal rows (m, d_in); the same ones every time."""
    generator = torch.Generator().manual_seed(_COMPLETION_SEED)
    drawn = torch.randn(rows.shape[1], count, generator=generator, dtype=torch.float64).to(rows.device)
    # The second pass removes what rounding in the first has left.
    for _ in range(2):
        drawn, _ = torch.linalg.qr(drawn - rows.T @ (rows @ drawn))
    return drawn.T


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
