"""What a least-squares fit needs to know of a projection's tokens: sums of their products, which do not grow with them.

    gram   Σ w h hᵀ        cross   Σ w h tᵀ        and the plain sums of h, t and ||t||²

h enters the projection, t is what should leave it, and w is the token's weight. Every fit, and the error of every
answer, follows from these sums, so any number of tokens fits into the memory of one Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.pruning.method import GRAM_CHUNK, add_gram, gram_precision


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the weighted tokens of one projection with k inputs and d outputs."""

    weight: Tensor
    """() float64, the sum of the tokens' weights."""
    gram: Tensor
    """(k, k) symmetric."""
    cross: Tensor
    """(k, d)."""
    inputs: Tensor
    """(k,) weighted sum of the inputs."""
    targets: Tensor
    """(d,) weighted sum of the targets."""
    square: Tensor
    """() float64, weighted sum of the targets' squares."""

    @classmethod
    def none(cls, k: int, d: int, device: torch.device | str = "cpu") -> Moments:
        """Of no tokens."""
        precise = gram_precision(k)

        def zeros(*size: int, dtype: torch.dtype = precise) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        double = torch.float64
        return cls(zeros(dtype=double), zeros(k, k), zeros(k, d), zeros(k), zeros(d), zeros(dtype=double))

    @torch.no_grad()
    def observe(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: inputs (tokens, k), targets (tokens, d), weights (tokens,) or one for each."""
        for start in range(0, len(inputs), GRAM_CHUNK):
            part = slice(start, start + GRAM_CHUNK)
            seen, wanted = _at_least_single(inputs[part]), _at_least_single(targets[part])
            share = seen.new_ones(len(seen)) if weights is None else weights[part].to(seen.dtype)
            root = share.sqrt()[:, None]
            seen, wanted = seen * root, wanted * root
            self.weight.add_(share.sum(dtype=torch.float64))
            self.inputs.add_(root.T.mm(seen).squeeze(0))
            self.targets.add_(root.T.mm(wanted).squeeze(0))
            add_gram(self.gram, seen)
            self.cross.add_(seen.T @ wanted)
            self.square.add_(wanted.square().sum(dtype=torch.float64))

    def columns(self, kept: Tensor) -> Moments:
        """The same tokens, of whose inputs only those at the indices `kept` enter."""
        gram = self.gram.index_select(0, kept).index_select(1, kept)
        return Moments(self.weight, gram, self.cross[kept], self.inputs[kept], self.targets, self.square)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Σ w ||t - W h - b||² / Σ w ||t||² of a projection with weight (d, k) and bias (d,) or None."""
        precise = weight.to(self.gram.dtype)
        left = self.square + (precise * (precise @ self.gram)).sum().double()
        left = left - 2 * (precise * self.cross.T).sum().double()
        if bias is not None:
            offset = bias.to(self.gram.dtype)
            left = left + self.weight * offset.square().sum().double()
            left = left + 2 * (offset @ (precise @ self.inputs - self.targets)).double()
        return max(float(left), 0.0) / max(float(self.square), 1e-300)

    def given(self, weight: Tensor, bias: Tensor | None) -> Moments:
        """The same tokens with what `weight` (d, k) and `bias` make of them as targets, whose squares are left out."""
        precise = weight.to(self.gram.dtype)
        cross, targets = self.gram @ precise.T, precise @ self.inputs
        if bias is not None:
            offset = bias.to(self.gram.dtype)
            cross, targets = cross + torch.outer(self.inputs, offset), targets + self.weight.to(offset.dtype) * offset
        return replace(self, cross=cross, targets=targets, square=torch.full_like(self.square, torch.nan))


def _at_least_single(value: Tensor) -> Tensor:
    """Halves as float32: sums of their products over thousands of tokens would overflow or lose what matters."""
    return value.float() if value.dtype.itemsize < 4 else value
