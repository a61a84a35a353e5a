"""Batch sizes under which all devices need about the same time for an iteration, and what waiting is left.

MergeSFL Eq. 7 to 9, with the fixed seconds of an iteration added; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinecli.split.control.estimates import Paces

# A quotient this close below a whole number is that number; 64 times a pace, divided by the pace, must be 64.
_ROUNDING = 1e-9


def regulated_batches(paces: Paces, largest_batch: int, limits: Tensor) -> Tensor:
    """A batch for each device, (devices,) int64, by Eq. 9.

        l   = argmin D (mu_i + beta_i) + e_i                  the fastest, which gets D
        d_i = max(1, floor((D (mu_l + beta_l) + e_l - e_i) / (mu_i + beta_i)))

    With equal e this is the paper's formula. No batch exceeds D, since nobody does D rows faster than l.

    Args:
        largest_batch: D.
        limits: the most rows of each device, (devices,) int64, at least 1: its examples, or what its memory holds.

    Raises: ValueError if a limit or D is below 1.
    """
    if largest_batch < 1 or int(limits.min()) < 1:
        raise ValueError("The largest batch and every device's limit must be at least 1 row.")
    rows, fixed = paces.row_seconds, paces.fixed_seconds
    fastest = int((largest_batch * rows + fixed).argmin())
    available = largest_batch * rows[fastest] + (fixed[fastest] - fixed)
    quotients = (available / rows + _ROUNDING).floor()
    # A device that takes no time for a row is limited by D alone; its quotient is not a number.
    quotients = torch.where(rows > 0, quotients, float(largest_batch))
    return quotients.clamp(1, largest_batch).long().minimum(limits)


def average_waiting(durations: Tensor) -> float:
    """W, inferred: seconds that a device waits for the slowest, on average over the cohort."""
    return float((durations.max() - durations).mean())


def idle_share(durations: Tensor) -> float:
    """The share of the iteration that devices wait: 1 - mean t_i / max t_i; 0 if it takes no time."""
    longest = float(durations.max())
    return average_waiting(durations) / longest if longest > 0 else 0.0
