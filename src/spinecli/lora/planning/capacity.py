"""How fast each device is, estimated from the rounds it took part in.

LEGEND, inferred: see docs/algorithms/legend.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

RETENTION = 0.8
"""Weight of the old estimate in the moving average; LEGEND, inferred from the same authors' MergeSFL."""


@dataclass(frozen=True)
class Capacity:
    """What a device needs for each unit of work; plain numbers that `dataclasses.asdict` stores."""

    forward_seconds: float
    """mu0: a forward pass of one step."""
    block_seconds: float
    """mu: backward through one block that carries LoRA, a step."""
    rank_seconds: float
    """beta: sending and receiving one unit of rank in one block."""
    rank_bytes: float = 0.0
    """Bytes of that, both ways."""
    latency_seconds: float = 0.0
    """What a round costs whatever is computed and sent."""

    def updated(self, observed: Capacity, retention: float = RETENTION) -> Capacity:
        """The exponential moving average: retention * old + (1 - retention) * observed, entry by entry."""
        pairs = zip(astuple(self), astuple(observed), strict=True)
        return Capacity(*(retention * old + (1 - retention) * new for old, new in pairs))


@dataclass(frozen=True)
class Observation:
    """What a server sees of one device's round."""

    depth: int
    """Blocks that carried LoRA."""
    rank_sum: int
    """Sum of their ranks."""
    steps: int
    """Local steps."""
    forward_seconds: float
    """Of all steps together."""
    backward_seconds: float
    """Of all steps together."""
    transferred_bytes: int
    """Up and down."""
    transfer_seconds: float
    """Up and down."""

    def capacity(self, latency_seconds: float = 0.0) -> Capacity:
        """The capacity that explains this round: mu0 and mu from the seconds of a step, beta from those of a rank.

        Args:
            latency_seconds: the part of the transfer that does not depend on its size, where that is known.

        Raises: ValueError if the round had no step or trained no rank.
        """
        if min(self.depth, self.rank_sum, self.steps) < 1:
            raise ValueError(f"a round of {self.steps} steps at depth {self.depth} tells nothing about a device")
        return Capacity(
            forward_seconds=self.forward_seconds / self.steps,
            block_seconds=self.backward_seconds / self.steps / self.depth,
            rank_seconds=max(0.0, self.transfer_seconds - latency_seconds) / self.rank_sum,
            rank_bytes=self.transferred_bytes / self.rank_sum,
            latency_seconds=latency_seconds,
        )


@dataclass(frozen=True, eq=False)
class Capacities:
    """The capacities of many devices, one vector a figure."""

    forward_seconds: Tensor
    block_seconds: Tensor
    rank_seconds: Tensor
    rank_bytes: Tensor
    latency_seconds: Tensor

    @classmethod
    def of(cls, capacities: Sequence[Capacity]) -> Capacities:
        """Stack; every field becomes (devices,) float64."""
        rows = torch.tensor([astuple(each) for each in capacities], dtype=torch.float64)
        return cls(*rows.view(-1, len(fields(Capacity))).unbind(dim=1))

    @property
    def matrix(self) -> Tensor:
        """(devices, 5) float64, columns in the order of the fields."""
        return torch.stack([getattr(self, field.name) for field in fields(self)], dim=1)

    def single(self, index: int) -> Capacity:
        """The capacity of one device."""
        return Capacity(*self.matrix[index].tolist())
