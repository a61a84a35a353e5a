"""The best factors of a given rank for a product of longer ones, without a singular value decomposition at full size.

With B = Q_B R_B and A^T = Q_A R_A, the product is Q_B (R_B R_A^T) Q_A^T, and the core in the middle is as small as the
stack of factors is. Its decomposition is the product's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.lora.factors import Factors

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
