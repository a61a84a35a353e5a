"""What a scoring pass sees of a projection's inputs and outputs, accumulated chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this width a Gram matrix is summed in float64; above it, its size matters more than its last digits.
_DOUBLE_WIDTH = 4096


class InputStatistics:
    """Sums over the calibration tokens that enter one projection Y = X Wᵀ.

    Args:
        width: d_in of the projection.
        gram: also accumulate the Gram matrix of the inputs.
    """

    def __init__(self, width: int, *, gram: bool = False) -> None:
        self.tokens = 0
        self.square_sum = torch.zeros(width, dtype=torch.float64)
        """(d_in,) sum of squares of each input."""
        self.sum = torch.zeros(width, dtype=torch.float64)
        """(d_in,) sum of each input."""
        self.output_square_sum = 0.0
        """Squared Frobenius norm of Y."""
        self.gram: Tensor | None = None
        """(d_in, d_in) Xᵀ X, if asked for."""
        if gram:
            self.gram = torch.zeros(width, width, dtype=torch.float64 if width <= _DOUBLE_WIDTH else torch.float32)

    def observe(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add a chunk: inputs (tokens, d_in), outputs (tokens, d_out)."""
        precise = inputs.detach().to("cpu", torch.float64)
        self.tokens += len(precise)
        self.square_sum += precise.square().sum(dim=0)
        self.sum += precise.sum(dim=0)
        self.output_square_sum += float(outputs.detach().double().square().sum())
        if self.gram is not None:
            single = inputs.detach().to("cpu", torch.float32)  # a sum of squares in half precision overflows
            if self.gram.dtype is torch.float32:
                self.gram.addmm_(single.T, single)  # a wide product is not held twice
            else:
                self.gram += single.T @ single

    @property
    def required_gram(self) -> Tensor:
        """The Gram matrix; ValueError if it was not asked for."""
        if self.gram is None:
            raise ValueError("the Gram matrix was not accumulated")
        return self.gram

    @property
    def norms(self) -> Tensor:
        """(d_in,) L2 norm of each input over the tokens."""
        return self.square_sum.sqrt()

    @property
    def variances(self) -> Tensor:
        """(d_in,) unbiased variance of each input over the tokens."""
        mean = self.sum / self.tokens
        return (self.square_sum - self.tokens * mean.square()).clamp_min(0) / max(1, self.tokens - 1)


class BlockInfluence:
    """How much a block turns the hidden states: 1 - mean cosine between its inputs and outputs.

    ShortGPT's block influence; that COMP ranks layers by it is inferred, see docs/algorithms/comp.md.
    """

    def __init__(self) -> None:
        self._cosines = 0.0
        self._tokens = 0

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Add a chunk: hidden states (rows, length, d_model) before and after the block."""
        cosines = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        self._cosines += float(cosines.sum())
        self._tokens += cosines.numel()

    @property
    def value(self) -> float:
        """From 0 (the block only rescales) to 2."""
        return 1.0 - self._cosines / self._tokens
