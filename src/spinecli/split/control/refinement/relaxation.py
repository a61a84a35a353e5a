"""Eq. 14 over real numbers, by its Lagrange dual.

The number of rows times the divergence, sum_y a_y log(a_y / (|a| Phi_0(y))) with a = sum_i d_i V_i, is convex in d, so
that the set of allowed d is convex, too, and one multiplier decides how much divergence is worth how many seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinecli.split.control.divergence import merged_distribution
from spinecli.split.control.refinement.problem import Problem

_STEPS = 50
_BISECTIONS = 12
# What is found here is rounded afterwards, which adds to the divergence.
_MARGIN = 0.98
_TINY = 1e-300


def relaxed_batches(problem: Problem) -> list[Tensor]:
    """Real batches worth rounding, each (devices,) float64 within its limits, but not always within the budget.

    First the cheapest that keep the limit, if any do; then those of the lowest divergence, whatever they cost.
    """
    lowest = _descended(problem, problem.batches.double(), price=0.0)
    wanted = _MARGIN * problem.divergence_limit
    if float(problem.divergence(lowest)) > wanted:
        return [lowest]
    # From this price on, no step leaves the start.
    low, high = 0.0, float((_slopes(problem, problem.batches.double()).abs() / problem.costs.clamp(min=1e-6)).max())
    cheapest = lowest
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        found = _descended(problem, cheapest, price)
        if float(problem.divergence(found)) <= wanted:
            low, cheapest = price, found
        else:
            high = price
    return [cheapest, lowest]


def _descended(problem: Problem, batches: Tensor, price: float) -> Tensor:
    """Exponentiated gradient steps on  rows * KL + price * sum_i |d_i - d_i^0| costs_i  within the limits.

    Step length 1 cannot overshoot: rows * KL never curves more than the entropy by which the steps are measured. The
    absolute value and the limits are taken exactly in every step, device by device.
    """
    start, limits = problem.batches.double(), problem.limits.double()
    threshold = (price * problem.costs).exp()
    for _ in range(_STEPS):
        ahead = batches * (-_slopes(problem, batches)).exp()
        above, below = (ahead / threshold).maximum(start), (ahead * threshold).minimum(start)
        batches = torch.where(ahead > start, above, below).minimum(limits).clamp(min=1.0)
    return batches


def _slopes(problem: Problem, batches: Tensor) -> Tensor:
    """By how much each device's next row raises the divergence, times the rows: V log(Phi / Phi_0) - KL, (devices,)."""
    merged = merged_distribution(batches, problem.distributions)
    ratios = (merged.clamp(min=_TINY) / problem.reference.clamp(min=_TINY)).log()
    return problem.distributions @ ratios - merged @ ratios
