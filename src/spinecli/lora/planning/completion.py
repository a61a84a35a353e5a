"""What a round takes on each device at each depth: seconds, bytes, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.lora.planning.capacity import Capacities
from spinecli.lora.planning.ranks import rank_sums


@dataclass(frozen=True, eq=False)
class CostTable:
    """Costs of a round; row i is device i, column k - 1 is depth k. All (devices, blocks) float64."""

    seconds: Tensor
    """From the start of the round until the device's update has arrived; never falls with depth."""
    traffic_bytes: Tensor
    """Up and down."""
    memory_bytes: Tensor
    """Peak while training."""

    def at(self, figure: Tensor, depths: Tensor) -> Tensor:
        """The column of one of the figures at each device's depth, 0 at depth 0; (devices,)."""
        chosen = figure.gather(1, (depths - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(depths > 0, chosen, torch.zeros_like(chosen))


def completion_table(capacities: Capacities, ranks: Tensor, steps: int, memory_bytes: Tensor) -> CostTable:
    """LEGEND's completion-time model, from capacity estimates.

        t_i(k) = steps * (mu0_i + k mu_i) + beta_i * (sum of the last k ranks) + latency_i

    LEGEND, inferred: see docs/algorithms/legend.md.

    Args:
        ranks: (blocks,) rank distribution.
        steps: local steps a round (tau).
        memory_bytes: (devices, blocks), or (blocks,) where it is the same on all.
    """
    blocks = len(ranks)
    depth = torch.arange(1, blocks + 1, dtype=torch.float64)
    sums = rank_sums(ranks).double()
    compute = steps * (capacities.forward_seconds[:, None] + capacities.block_seconds[:, None] * depth)
    transfer = capacities.rank_seconds[:, None] * sums + capacities.latency_seconds[:, None]
    return CostTable(
        seconds=compute + transfer,
        traffic_bytes=capacities.rank_bytes[:, None] * sums,
        memory_bytes=memory_bytes.double().expand(len(capacities.forward_seconds), blocks),
    )
