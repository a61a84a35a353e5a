"""The rank distribution: one rank a block, rising toward the output, the same on every device.

A device of depth k uses the last k entries. Because block l has the same rank wherever it is trained, its factors can
be averaged as they are: no padding, no factorisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.lora.planning.capacity import Capacities


def rank_distribution(blocks: int, budget: int, step: int = 1, minimum: int = 1) -> Tensor:
    """Ranks in arithmetic progression, r_l = r_base + step * l, that sum to the budget.

    What the progression alone cannot express is handed out one by one from the output downward; where r_base would fall
    below the minimum, the lowest blocks stay at it and the progression starts above them. LEGEND: the arithmetic form
    and the step of 1 are those of a third-party LEGEND; rounding and minimum are inferred, see
    docs/algorithms/legend.md.

    Args:
        budget: sum of all ranks, at least blocks * minimum.
        step: by how much the rank grows from one block to the next, 0 for equal ranks.

    Returns: (blocks,) int64, never falling.

    Raises: ValueError if the budget cannot pay the minimum in every block, or the step is negative.
    """
    if step < 0 or minimum < 1 or blocks < 1:
        raise ValueError("a rank distribution needs a block, a minimum of 1 and a step that does not fall")
    if budget < blocks * minimum:
        raise ValueError(f"a sum of {budget} leaves less than rank {minimum} for each of {blocks} blocks")
    rise = step * torch.arange(blocks)
    low, high = minimum - int(rise[-1]), budget // blocks + 1
    while high - low > 1:
        middle = (low + high) // 2
        if int((middle + rise).clamp(min=minimum).sum()) <= budget:
            low = middle
        else:
            high = middle
    ranks = (low + rise).clamp(min=minimum)
    left = budget - int(ranks.sum())
    if left:  # fewer than blocks, or one more for all of them would have fitted
        ranks[-left:] += 1
    return ranks


def lowered(ranks: Tensor, minimum: int = 1) -> Tensor:
    """The distribution with r_base one lower, no rank below the minimum; (blocks,)."""
    return (ranks - 1).clamp(min=minimum)


def rank_sums(ranks: Tensor) -> Tensor:
    """Sum of the ranks that a device of each depth trains: entry k - 1 belongs to depth k; (blocks,)."""
    return ranks.flip(0).cumsum(0)


def ranks_by_device(ranks: Tensor, depths: Tensor) -> Tensor:
    """Rank of every block on every device, 0 where the device has no LoRA.

    Args:
        ranks: (blocks,).
        depths: (devices,), 0 for a device that takes no part.

    Returns: (devices, blocks) int64.
    """
    blocks = len(ranks)
    held = torch.arange(blocks) >= blocks - depths[:, None]
    return ranks * held


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
