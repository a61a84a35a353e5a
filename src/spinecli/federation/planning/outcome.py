"""What a plan means for the fleet, beside the uniform plan that it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.lora.planning.ranks import CostTable, ranks_by_device


@dataclass(frozen=True, eq=False)
class PlanOutcome:
    """One plan on one fleet; figures are 0 for a device that takes no part."""

    ranks: Tensor
    """(blocks,) int64."""
    depths: Tensor
    """(devices,) int64."""
    seconds: Tensor
    """(devices,) float64."""
    traffic_bytes: Tensor
    """(devices,) float64."""
    memory_bytes: Tensor
    """(devices,) float64."""

    @classmethod
    def of(cls, table: CostTable, ranks: Tensor, depths: Tensor) -> PlanOutcome:
        """Read the table at each device's depth."""
        figures = (table.seconds, table.traffic_bytes, table.memory_bytes)
        return cls(ranks, depths, *(table.at(figure, depths) for figure in figures))

    @property
    def round_seconds(self) -> float:
        """Of the slowest device; 0 if none takes part."""
        return float(self.seconds.max())

    def figures(self) -> FleetFigures:
        """Of all devices together."""
        return self._figures(torch.ones_like(self.depths, dtype=torch.bool))

    def by_class(self, classes: Sequence[str]) -> dict[str, FleetFigures]:
        """By device class, in the order of their first devices.

        Args:
            classes: class of each device.
        """
        names = list(dict.fromkeys(classes))
        numbers = torch.tensor([names.index(name) for name in classes])
        return {name: self._figures(numbers == index) for index, name in enumerate(names)}

    def _figures(self, chosen: Tensor) -> FleetFigures:
        part = chosen & (self.depths > 0)
        if not bool(part.any()):
            return FleetFigures(int(chosen.sum()), 0)
        depths, seconds = self.depths[part], self.seconds[part]
        placed = ranks_by_device(self.ranks, depths)
        return FleetFigures(
            devices=int(chosen.sum()),
            taking_part=int(part.sum()),
            depths=(int(depths.min()), int(depths.max())),
            ranks=(int(placed[placed > 0].min()), int(placed.max())),
            mean_depth=float(depths.double().mean()),
            seconds=float(seconds.max()),
            waiting=float((1 - seconds / self.round_seconds).mean()),
            traffic_bytes=float(self.traffic_bytes[part].sum()),
            memory_bytes=int(self.memory_bytes[part].max()),
        )


@dataclass(frozen=True)
class FleetFigures:
    """Some devices under a plan; what is None or 0 has no device to speak of."""

    devices: int
    taking_part: int
    depths: tuple[int, int] | None = None
    """Least and most."""
    ranks: tuple[int, int] | None = None
    """Lowest and highest in use."""
    mean_depth: float = 0.0
    seconds: float = 0.0
    """Of the slowest."""
    waiting: float = 0.0
    """Mean share of the whole fleet's round."""
    traffic_bytes: float = 0.0
    """Up and down, all together."""
    memory_bytes: int = 0
    """Of the fullest."""


def uniform_outcome(table: CostTable, ranks: Tensor, memory_limits: Tensor) -> PlanOutcome:
    """The plan without planning: the same rank in all blocks of every device that can hold that.

    Args:
        table: costs under `ranks`.
        ranks: (blocks,) all equal, or as near as the mean rank allows.
        memory_limits: (devices,) bytes.
    """
    holds = table.memory_bytes[:, -1] <= memory_limits
    return PlanOutcome.of(table, ranks, torch.where(holds, len(ranks), 0))
