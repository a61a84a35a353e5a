"""Cohorts made to fit: cut down to their limits, and filled up to them, many at once."""

from __future__ import annotations

import torch
from torch import Tensor

from spinecli.split.control.selection.candidates import Candidates


def trimmed(cohorts: Tensor, orders: Tensor, candidates: Candidates) -> Tensor:
    """Each cohort without the last of its devices, until it keeps budget and size.

    Args:
        cohorts: (cohorts, devices) bool.
        orders: (cohorts, devices) int64, a permutation of the devices for each cohort, from who stays longest.
    """
    taken = cohorts.gather(1, orders)
    rows = candidates.batches[orders] * taken
    stay = taken & (rows.cumsum(1) <= candidates.most_rows) & (taken.cumsum(1) <= candidates.largest_cohort)
    return torch.zeros_like(cohorts).scatter(1, orders, stay)


def filled(cohorts: Tensor, orders: Tensor, candidates: Candidates) -> Tensor:
    """Each cohort with every further device that still fits, first come first served.

    Args:
        cohorts: (cohorts, devices) bool, within budget and size.
        orders: (cohorts, devices) int64, a permutation of the devices for each cohort, from who is asked first.
    """
    taken, rows = cohorts.gather(1, orders), candidates.batches[orders]
    # Each turn takes all before the first device that no longer fits, which then never will.
    while True:
        room = candidates.most_rows - (rows * taken).sum(1, keepdim=True)
        seats = candidates.largest_cohort - taken.sum(1, keepdim=True)
        open_ = ~taken & (rows <= room)
        coming = open_ & ((rows * open_).cumsum(1) <= room) & (open_.cumsum(1) <= seats)
        if not bool(coming.any()):
            return torch.zeros_like(cohorts).scatter(1, orders, taken)
        taken = taken | coming


def drawn_orders(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Orders in which devices are drawn without replacement by weight, (count, devices) int64.

    By the exponential race: with E_i exponential of rate w_i, who comes first is drawn in proportion to w.

    Args:
        weights: (devices,) float64, positive.
    """
    uniform = torch.rand(count, len(weights), generator=generator, dtype=torch.float64)
    return (-torch.log1p(-uniform) / weights).argsort(dim=1, stable=True)
