"""Solve Eq. 14 as well as integers allow, and say whether it could be solved.

The paper's Lagrange-dual solver is not published; this one is this project's, see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spinecli.split.control.refinement.moves import moved, rounded
from spinecli.split.control.refinement.problem import Problem
from spinecli.split.control.refinement.relaxation import relaxed_batches


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
