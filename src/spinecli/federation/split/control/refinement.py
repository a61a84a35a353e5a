"""Eq. 14 over integers, a row at a time; the steepest moves of a third party's reconstruction of MergeSFL.

Eq. 14 over real numbers, by its Lagrange dual.

The number of rows times the divergence, sum_y a_y log(a_y / (|a| Phi_0(y))) with a = sum_i d_i V_i, is convex in d, so
that the set of allowed d is convex, too, and one multiplier decides how much divergence is worth how many seconds.

Solve Eq. 14 as well as integers allow, and say whether it could be solved.

The paper's Lagrange-dual solver is not published; this one is this project's, see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spinecli.federation.split.control.batches import whole_rows
from spinecli.federation.split.control.estimates import divergence, merged_distribution


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


_MOST_MOVES = 2000
_SMALLEST_GAIN = 1e-9


def rounded(batches: Tensor, problem: Problem) -> Tensor:
    """Real batches as integers within limits and budget, (devices,) int64, by largest remainder."""
    scaled = _within_budget(batches, problem.most_rows)
    whole = scaled.floor()
    wanted = min(round(float(scaled.sum())), problem.most_rows) - int(whole.sum())
    order = (scaled - whole).argsort(descending=True, stable=True)
    raised = order[(whole[order] < problem.limits[order])][: max(wanted, 0)]
    return whole.long().index_add(0, raised, torch.ones_like(raised))


def moved(batches: Tensor, problem: Problem) -> Tensor:
    """The batches after single-row moves: down to the limit of the divergence, then back toward d^0 within it.

    While the limit is exceeded, a move that reaches it is taken, of these the cheapest; if there is none, the move that
    comes closest. Then rows are taken back, the most expensive first. Every move makes progress, so none repeats.
    """
    current = float(problem.divergence(batches))
    for _ in range(_MOST_MOVES):
        if current <= problem.divergence_limit:
            break
        devices, steps = _allowed_moves(batches, problem)
        found = problem.after_moves(batches, devices, steps)
        if not len(found) or float(found.min()) >= current - _SMALLEST_GAIN:
            return batches
        away = (batches - problem.batches)[devices] * steps >= 0
        added = problem.costs[devices].where(away, -problem.costs[devices])
        reaching = found <= problem.divergence_limit
        best = (added.where(reaching, math.inf) if bool(reaching.any()) else found).argmin()
        batches = batches.index_add(0, devices[best, None], steps[best, None])
        current = float(problem.divergence(batches))
    return _taken_back(batches, problem) if current <= problem.divergence_limit else batches


def _allowed_moves(batches: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Every device that may have one row more or less, and which, two vectors of int64."""
    up, down = (batches < problem.limits).nonzero().flatten(), (batches > 1).nonzero().flatten()
    if int(batches.sum()) >= problem.most_rows:
        up = up[:0]
    return torch.cat([up, down]), torch.cat([torch.ones_like(up), -torch.ones_like(down)])


def _taken_back(batches: Tensor, problem: Problem) -> Tensor:
    """Rows moved back toward d^0 while the divergence keeps its limit."""
    for _ in range(_MOST_MOVES):
        toward = (problem.batches - batches).sign()
        if int(batches.sum()) >= problem.most_rows:
            toward = toward.clamp(max=0)
        devices = toward.nonzero().flatten()
        allowed = problem.after_moves(batches, devices, toward[devices]) <= problem.divergence_limit
        # Sums that were updated can differ from sums anew in their last bit, which must not cost the limit.
        for best in problem.costs[devices].where(allowed, -1.0).argsort(descending=True, stable=True)[: allowed.sum()]:
            changed = batches.index_add(0, devices[best, None], toward[devices[best], None])
            if float(problem.divergence(changed)) <= problem.divergence_limit:
                batches = changed
                break
        else:
            return batches
    return batches


def _within_budget(batches: Tensor, most: int) -> Tensor:
    """Scaled down, if need be, to the largest common factor that keeps the budget; nobody below one row."""
    if float(batches.sum()) <= most:
        return batches
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = float((batches * middle).clamp(min=1.0).sum()) <= most
        low, high = (middle, high) if fits else (low, middle)
    return (batches * low).clamp(min=1.0)


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


@dataclass(frozen=True, eq=False)
class Refinement:
    """What became of a cohort's batches."""

    batches: Tensor
    """(devices,) int64."""
    divergence: float
    """KL(Phi_S || Phi_0) with these batches."""
    feasible: bool
    """Whether it is within its limit. If not, these are the batches of the lowest divergence that was found."""

    @classmethod
    def of(cls, batches: Tensor, problem: Problem) -> Refinement:
        """These batches, judged."""
        reached = float(problem.divergence(batches))
        return cls(batches, reached, reached <= problem.divergence_limit)


def refined(problem: Problem) -> Refinement:
    """The smallest change of the durations that brings the divergence below its limit, which is never relaxed.

    Batches that keep the limit already stay as they are. The divergence never rises above that of the given batches,
    unless it keeps the limit.
    """
    if float(problem.divergence(problem.batches)) <= problem.divergence_limit:
        return Refinement.of(problem.batches, problem)
    outcomes = [Refinement.of(problem.batches, problem)]
    for relaxed in relaxed_batches(problem):
        outcomes.append(Refinement.of(moved(rounded(relaxed, problem), problem), problem))
        if outcomes[-1].feasible:
            return outcomes[-1]
    return min(outcomes, key=lambda outcome: outcome.divergence)
