"""A frozen projection with an optional trainable pair of factors beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class AdaptedLinear(nn.Module):
    """Computes W x + b + scale B A x; without factors, only W x + b.

    The weight and bias are the dense ones of the shared base until `narrow` keeps only some of their rows or columns,
    and are dense again after `restore`. Nothing is copied for a device that is not pruned.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._dense = (linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        self._whole = self._dense
        self._kept: Tensor | None = None
        self.weight: Tensor = self._dense[0]
        """(d_out, d_in), frozen."""
        self.bias: Tensor | None = self._dense[1]
        self.a: nn.Parameter | None = None
        """(rank, d_in) float32."""
        self.b: nn.Parameter | None = None
        """(d_out, rank) float32, without the scale."""
        self.scale = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., d_in) -> (..., d_out)."""
        output = functional.linear(hidden, self.weight, self.bias)
        if self.a is None or self.b is None:
            return output
        inner = functional.linear(hidden, self.a.to(hidden.dtype))
        return torch.add(output, functional.linear(inner, self.b.to(hidden.dtype)), alpha=self.scale)

    @property
    def dense_shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the uncut projection."""
        return tuple(self._dense[0].shape)  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """Input width as it is now."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Output width as it is now."""
        return int(self.weight.shape[0])

    def shift(self, change: Tensor) -> None:
        """Add a fixed change (d_out, d_in) to the uncut weight, until `restore`."""
        self._whole = (self._dense[0] + change.to(self._dense[0].dtype), self._dense[1])
        self.weight = self._whole[0]

    def narrow(self, axis: int, kept: Tensor) -> None:
        """Keep some rows (axis 0) or columns (axis 1), and the same ones of factors that are attached.

        Args:
            kept: rising indices into the dense projection, among those kept by an earlier call.
        """
        weight, bias = self._whole
        self.weight = weight.index_select(axis, kept)
        self.bias = bias.index_select(0, kept) if axis == 0 and bias is not None else bias
        if self.a is not None and self.b is not None:
            places = kept if self._kept is None else torch.isin(self._kept, kept).nonzero().flatten()
            if axis == 0:
                self.b = nn.Parameter(self.b.detach().index_select(0, places), self.b.requires_grad)
            else:
                self.a = nn.Parameter(self.a.detach().index_select(1, places), self.a.requires_grad)
        self._kept = kept

    def attach(self, a: Tensor, b: Tensor, scale: float, *, train_a: bool = True, trainable: bool = True) -> None:
        """Put factors beside the weight; they are copied, so training changes no one else's."""
        self.a = nn.Parameter(a.detach().to(self.weight.device, torch.float32, copy=True), trainable and train_a)
        self.b = nn.Parameter(b.detach().to(self.weight.device, torch.float32, copy=True), trainable)
        self.scale = scale

    def restore(self) -> None:
        """The dense weight, without factors."""
        self._whole = self._dense
        self._kept = None
        self.weight, self.bias = self._dense
        self.a = self.b = None
        self.scale = 1.0
