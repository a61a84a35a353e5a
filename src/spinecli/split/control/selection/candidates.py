"""What a selection chooses from, and the interface that every selection has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from spinecli.split.control.divergence import divergence
from spinecli.split.control.scaling import whole_rows


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
