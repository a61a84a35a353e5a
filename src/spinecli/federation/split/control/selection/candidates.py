"""What a selection chooses from, and the interface that every selection has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from spinecli.federation.split.control.batches import whole_rows
from spinecli.federation.split.control.estimates import divergence


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


@dataclass(frozen=True, eq=False)
class Candidates:
    """All devices that could take part in a round, and what limits a cohort of them.

    Raises: ValueError if there is none, if the shapes contradict each other, or if no single device fits the budget.
    """

    batches: Tensor
    """d, what each would get in this round, (devices,) int64, at least 1."""
    distributions: Tensor
    """V, (devices, labels) float64; a single column of ones where there are no labels."""
    reference: Tensor
    """Phi_0, (labels,) float64."""
    priorities: Tensor
    """p of Eq. 13, (devices,) float64, positive."""
    budget_rows: float
    """Most rows of a cohort: the server's ingress budget over the bytes of a row (Eq. 10)."""
    largest_cohort: int
    """Most devices in it."""

    def __post_init__(self) -> None:
        devices = len(self.batches)
        if devices == 0 or self.largest_cohort < 1:
            raise ValueError("A cohort needs at least one device.")
        if len(self.priorities) != devices or self.distributions.shape != (devices, len(self.reference)):
            raise ValueError("Batches, distributions, reference and priorities are of different devices or labels.")
        if int(self.batches.min()) < 1 or int(self.batches.min()) > self.most_rows:
            raise ValueError(f"No batch of at least one row fits the budget of {self.budget_rows} rows.")

    @property
    def devices(self) -> int:
        """How many there are."""
        return len(self.batches)

    @cached_property
    def most_rows(self) -> int:
        """The budget in whole rows."""
        return whole_rows(self.budget_rows)

    @cached_property
    def label_rows(self) -> Tensor:
        """Expected rows of each label that a device contributes, d_i V_i, (devices, labels) float64."""
        return self.batches.double()[:, None] * self.distributions

    def divergences(self, cohorts: Tensor) -> Tensor:
        """KL(Phi_S || Phi_0) of many cohorts at once, (cohorts,) from (cohorts, devices) bool, none of them empty."""
        merged = cohorts.double() @ self.label_rows
        return divergence(merged / merged.sum(dim=1, keepdim=True), self.reference)

    def fits(self, cohorts: Tensor) -> Tensor:
        """Whether each cohort keeps budget and size and has somebody in it, (cohorts,) from (cohorts, devices)."""
        size, rows = cohorts.sum(dim=1), (cohorts * self.batches).sum(dim=1)
        return (size >= 1) & (size <= self.largest_cohort) & (rows <= self.most_rows)


class Selection(Protocol):
    """A way to choose the cohort of a round."""

    def select(self, candidates: Candidates, generator: torch.Generator) -> Tensor:
        """Indices of the chosen devices, rising, int64; at least one, within budget and size."""
