"""A tensor of a checkpoint whose values are not in memory: on disk, or made when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it comes."""

    @property
    def bytes(self) -> int:
        """Size on disk."""

    def read(self) -> Tensor:
        """The values."""


@dataclass(frozen=True, eq=False)
class MadeTensor:
    """A tensor that is computed each time it is read: cut, merged with an adapter, or filled with zeros."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size on disk, once it is written."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values; ValueError if they are not what was announced."""
        value = self.make()
        if tuple(value.shape) != self.shape or value.dtype != self.dtype:
            raise ValueError(
                f"announced as {self.shape} {self.dtype}, a tensor was made as {tuple(value.shape)} {value.dtype}"
            )
        return value


def held(value: Tensor) -> MadeTensor:
    """A tensor that is in memory."""
    return MadeTensor(tuple(value.shape), value.dtype, lambda: value)
