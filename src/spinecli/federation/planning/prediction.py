"""Seconds, bytes and memory of a round for every device of a fleet at every depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.federation.planning.workload import DepthCosts, Workload
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.simulation.fleet import Fleet
from spinecli.lora.planning.capacity import Capacities
from spinecli.lora.planning.ranks import CostTable, rank_sums, ranks_by_device


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


_PROBE_BYTES = 1_000_000


@dataclass(frozen=True, eq=False)
class Speeds:
    """How fast each device is; all (devices,) float64."""

    seconds_per_flop: Tensor
    up_seconds_per_byte: Tensor
    down_seconds_per_byte: Tensor
    latency_seconds: Tensor
    """Of one message, either way."""


def first_speeds(fleet: Fleet, seed: int) -> Speeds:
    """The fleet as it is in its first round under `seed`: modes and links as drawn, jitter at its median."""
    rows = []
    for device in fleet.devices:
        now = replace(conditions(device, seed, 0), jitter=1.0)
        latency = now.upload_seconds(0)
        up, down = now.upload_seconds(_PROBE_BYTES) - latency, now.download_seconds(_PROBE_BYTES) - latency
        rows.append((now.compute_seconds(1.0), up / _PROBE_BYTES, down / _PROBE_BYTES, latency))
    return Speeds(*torch.tensor(rows, dtype=torch.float64).unbind(dim=1))


def memory_limits(fleet: Fleet) -> Tensor:
    """Bytes that training may take on each device; (devices,) float64."""
    return torch.tensor([device.device_class.memory_bytes for device in fleet.devices], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A round under one rank distribution; (devices, blocks) float64, column k - 1 for depth k."""

    compute_seconds: Tensor
    up_seconds: Tensor
    down_seconds: Tensor
    costs: DepthCosts

    @property
    def table(self) -> CostTable:
        """What the planner reads."""
        shape = self.compute_seconds.shape
        return CostTable(
            seconds=self.down_seconds + self.compute_seconds + self.up_seconds,
            traffic_bytes=2 * self.costs.message_bytes.expand(shape),
            memory_bytes=self.costs.memory_bytes.expand(shape),
        )


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predicts a round from shapes and speeds."""

    workload: Workload
    speeds: Speeds

    def predict(self, ranks: Tensor) -> Prediction:
        """A round under the rank distribution `ranks` (blocks,)."""
        costs, speeds = self.workload.by_depth(ranks), self.speeds
        latency = speeds.latency_seconds[:, None]
        return Prediction(
            compute_seconds=speeds.seconds_per_flop[:, None] * (costs.forward_flops + costs.backward_flops),
            up_seconds=latency + speeds.up_seconds_per_byte[:, None] * costs.message_bytes,
            down_seconds=latency + speeds.down_seconds_per_byte[:, None] * costs.message_bytes,
            costs=costs,
        )

    def capacities(self, ranks: Tensor) -> Capacities:
        """What one round at full depth would tell about each device: where LEGEND's estimates start from."""
        costs, speeds = self.workload.by_depth(ranks), self.speeds
        steps, blocks, rank_sum = self.workload.work.steps, len(ranks), int(rank_sums(ranks)[-1])
        size = costs.message_bytes[-1]
        return Capacities(
            forward_seconds=speeds.seconds_per_flop * costs.forward_flops[-1] / steps,
            block_seconds=speeds.seconds_per_flop * costs.backward_flops[-1] / steps / blocks,
            rank_seconds=(speeds.up_seconds_per_byte + speeds.down_seconds_per_byte) * size / rank_sum,
            rank_bytes=(2 * size / rank_sum).expand(len(speeds.latency_seconds)),
            latency_seconds=2 * speeds.latency_seconds,
        )
