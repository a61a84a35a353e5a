"""Seconds, bytes and memory of a round for every device of a fleet at every depth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.federation.planning.workload import DepthCosts, Workload
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.simulation.fleet import Fleet
from spinecli.lora.planning.capacity import Capacities
from spinecli.lora.planning.ranks import CostTable, rank_sums

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
