"""The optimisation problem of Eq. 14 for one cohort."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spinecli.split.control.divergence import divergence, merged_distribution
from spinecli.split.control.scaling import whole_rows


@dataclass(frozen=True, eq=False)
class Problem:
    """Which batches are wanted, and within which limits.

        min_d  (1/|S|) sum_i |d_i - d_i^0| (mu_i + beta_i)    s.t.  KL(Phi_S(d) || Phi_0) <= eps,
                                                                    sum_i d_i <= B / c,  1 <= d_i <= limit_i

    Raises: ValueError if the batches d^0 are not within budget and limits.
    """

    batches: Tensor
    """d^0, (devices,) int64."""
    distributions: Tensor
    """V of the cohort, (devices, labels) float64."""
    reference: Tensor
    """Phi_0, (labels,) float64."""
    row_seconds: Tensor
    """mu + beta, (devices,) float64."""
    limits: Tensor
    """Most rows of each device, (devices,) int64: D, its examples, its memory."""
    budget_rows: float
    divergence_limit: float
    """eps, in nats."""

    def __post_init__(self) -> None:
        outside = (self.batches < 1) | (self.batches > self.limits)
        if int(self.batches.sum()) > self.most_rows or bool(outside.any()):
            raise ValueError(f"{self.batches.tolist()} rows are beyond the budget or a device's limit.")

    @cached_property
    def most_rows(self) -> int:
        """The budget in whole rows."""
        return whole_rows(self.budget_rows)

    @cached_property
    def costs(self) -> Tensor:
        """What a row more or less costs, (devices,) float64: its seconds, in units of their mean."""
        mean = self.row_seconds.mean()
        # Where rows take no time, fewest rows are changed.
        return self.row_seconds / mean if float(mean) > 0 else torch.ones_like(self.row_seconds)

    def divergence(self, batches: Tensor) -> Tensor:
        """KL(Phi_S || Phi_0), (...) from (..., devices)."""
        return divergence(merged_distribution(batches, self.distributions), self.reference)

    def after_moves(self, batches: Tensor, devices: Tensor, steps: Tensor) -> Tensor:
        """The divergence after each of many single moves, (moves,): device devices[j] gets steps[j] rows more."""
        sums, rows = batches.double() @ self.distributions, batches.sum()
        sums = sums + steps.double()[:, None] * self.distributions[devices]
        # Subtraction can leave a label just below zero.
        return divergence(sums.clamp(min=0.0) / (rows + steps).double()[:, None], self.reference)

    def change(self, batches: Tensor) -> float:
        """The objective, in units of the mean seconds of a row."""
        return float(((batches - self.batches).abs() * self.costs).mean())
