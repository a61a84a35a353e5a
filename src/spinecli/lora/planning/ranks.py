"""The rank distribution: one rank a block, rising toward the output, the same on every device.

A device of depth k uses the last k entries. Because block l has the same rank wherever it is trained, its factors can
be averaged as they are: no padding, no factorisation.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
