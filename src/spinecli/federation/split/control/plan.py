"""The plan of one round: who takes part, with which batch, and what that will take.

MergeSFL's control module, its steps put together; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from spinecli.artifacts.record import FiniteRecord
from spinecli.artifacts.seeding import torch_generator
from spinecli.errors import OptionError
from spinecli.federation.config import SelectionName, SplitConfig, TrainConfig
from spinecli.federation.split.control.batches import idle_share, priorities, regulated_batches, scaled_up
from spinecli.federation.split.control.estimates import RETENTION, Pace, Paces, Population, paces_of
from spinecli.federation.split.control.refinement import Problem, Refinement, refined
from spinecli.federation.split.control.selection.candidates import Candidates
from spinecli.federation.split.control.selection.registry import selection_of


@dataclass(frozen=True)
class ControlOptions:
    """Limits and choices that hold in every round.

    Raises: OptionError if the server takes less than a row.
    """

    split: SplitConfig = field(default_factory=SplitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    budget_rows: float = math.inf
    """Most rows of features that the server takes in an iteration: its ingress budget over the bytes of a row."""
    regulation: bool = True
    """Whether batches follow paces and labels; without it all are equal, as in plain split federated learning."""
    by_labels: bool = True
    """Whether labels decide at all; without that devices are drawn, and batches stay as their paces give them."""

    def __post_init__(self) -> None:
        if not self.budget_rows >= 1:
            raise OptionError(
                f"--ingress holds {self.budget_rows:.2g} rows of features an iteration; raise it to at least one, or "
                "send smaller features with --feature-dtype."
            )

    @property
    def selection(self) -> SelectionName:
        """How a cohort is looked for."""
        return self.split.selection if self.by_labels else "random"

    @property
    def divergence_limit(self) -> float:
        """eps, in nats."""
        return self.split.divergence_limit if self.by_labels else math.inf


class ControlState(FiniteRecord):
    """Paces and participations by device name; written as JSON and read again, it plans the same to the last bit."""

    paces: dict[str, Pace] = Field(default_factory=dict)
    """Of all devices that were ever observed."""
    participations: dict[str, int] = Field(default_factory=dict)
    """K, completed rounds; 0 for who is not listed."""

    def after_round(
        self, observed: Mapping[str, Pace | None], completed: Iterable[str], retention: float = RETENTION
    ) -> ControlState:
        """The state after one more round; this one stays as it is.

        Args:
            observed: what the round told of its devices; also of those that were lost in it. None tells nothing.
            completed: the devices that took part to the end, whose K rises.
            retention: weight of the old estimate; the first observation of a device is taken as it is.
        """
        paces, participations = dict(self.paces), dict(self.participations)
        for name, pace in observed.items():
            if pace is not None:
                paces[name] = paces[name].updated(pace, retention) if name in paces else pace
        for name in completed:
            participations[name] = participations.get(name, 0) + 1
        return ControlState(paces=paces, participations=participations)

    def counts(self, population: Population) -> Tensor:
        """K, (devices,) int64."""
        return torch.tensor([self.participations.get(name, 0) for name in population.names])

    def values(self) -> dict[str, JsonValue]:
        """As plain JSON values, for `ControlState.model_validate` to read."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class ControlPlan:
    """Of one round."""

    cohort: dict[str, int]
    """Rows an iteration by device, in the order of the population."""
    divergence: float
    """KL(Phi_S || Phi_0) of the merged batch, in nats."""
    selected_divergence: float
    """The same with the batches as they were before their refinement."""
    feasible: bool
    """Whether the divergence keeps its limit."""
    start_batch: int
    """The largest batch that the selection started from, lowered by halves where it was infeasible."""
    seconds: float | None
    """Of an iteration, predicted; None while no pace is known."""
    idle_share: float | None
    """Share of it that devices wait, predicted; None while no pace is known."""

    @property
    def rows(self) -> int:
        """Of the merged batch."""
        return sum(self.cohort.values())


def plan_round(
    state: ControlState, population: Population, options: ControlOptions, seed: int, round_number: int
) -> ControlPlan:
    """Batches by Eq. 9, a cohort, its batches refined by Eq. 14 and raised to the budget.

    The fastest device starts from the largest batch, D at most, with which a full cohort of average devices stays
    within the budget: larger batches would fill it with fewer devices and make everybody's iteration longer.

    Where the divergence cannot keep its limit while the budget holds fewer devices than may take part, all is tried
    again from half the batches, and so on; the limit itself stays. Before any pace is known, batches start equal, are
    refined as if all rows took the same time, and are not raised. Without regulation they are equal and stay so. The
    same arguments give the same plan.
    """
    planner = _Planner(state, population, options, torch_generator(seed, "selection", round_number))
    start = planner.start()
    attempts = [planner.attempt(start)]
    while options.regulation and start > 1 and not attempts[-1].refinement.feasible and not attempts[-1].full:
        start //= 2
        attempts.append(planner.attempt(start))
    return planner.plan(min(attempts, key=lambda attempt: attempt.order))


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A cohort and its batches, before these are raised to the budget."""

    start_batch: int
    cohort: Tensor
    problem: Problem
    refinement: Refinement
    full: bool
    """Whether no further device could take part, however small the batches."""

    @property
    def order(self) -> tuple[bool, float]:
        """Feasible ones first; otherwise by divergence."""
        return not self.refinement.feasible, self.refinement.divergence


class _Planner:
    """What all attempts of a round have in common."""

    def __init__(
        self, state: ControlState, population: Population, options: ControlOptions, generator: torch.Generator
    ) -> None:
        known = paces_of(state.paces, list(zip(population.names, population.classes, strict=True)))
        self._paces = None if known is None else Paces.of(known)
        self._population, self._options, self._generator = population, options, generator
        self._priorities = priorities(state.counts(population))
        # Nobody alone may exceed the budget.
        self.largest = math.floor(min(options.split.largest_batch, options.budget_rows))
        self._limits = population.limits.clamp(max=self.largest)
        self.paced = options.regulation and known is not None

    def start(self) -> int:
        """The largest batch that the first attempt starts from."""
        options = self._options
        if self._paces is None or not self.paced:
            return min(options.train.batch_size, self.largest)
        devices = min(options.train.cohort, len(self._limits))
        low, high = 1, self.largest
        while low < high:
            middle = (low + high + 1) // 2
            rows = devices * float(regulated_batches(self._paces, middle, self._limits).double().mean())
            low, high = (middle, high) if rows <= options.budget_rows else (low, middle - 1)
        return low

    def attempt(self, start: int) -> _Attempt:
        """Selection and refinement from batches of at most `start` rows."""
        population, options = self._population, self._options
        batches = self._limits.clamp(max=start)
        if self._paces is not None and self.paced:
            batches = regulated_batches(self._paces, start, self._limits)
        candidates = Candidates(
            batches=batches,
            distributions=population.distributions,
            reference=population.reference,
            priorities=self._priorities,
            budget_rows=options.budget_rows,
            largest_cohort=options.train.cohort,
        )
        cohort = selection_of(options.selection).select(candidates, self._generator)
        unknown = torch.ones(len(cohort), dtype=torch.float64)
        problem = Problem(
            batches=batches[cohort],
            distributions=population.distributions[cohort],
            reference=population.reference,
            row_seconds=unknown if self._paces is None else self._paces.row_seconds[cohort],
            limits=self._limits[cohort],
            budget_rows=options.budget_rows,
            divergence_limit=options.divergence_limit,
        )
        refinement = refined(problem) if options.regulation else Refinement.of(problem.batches, problem)
        full = len(cohort) == min(options.train.cohort, candidates.devices)
        return _Attempt(start, cohort, problem, refinement, full)

    def plan(self, attempt: _Attempt) -> ControlPlan:
        """The attempt with its batches raised to the budget, where paces are known, and its prediction."""
        problem, refinement = attempt.problem, attempt.refinement
        # Where the limit cannot be kept, raising the batches must not make it worse.
        highest = max(problem.divergence_limit, refinement.divergence)
        if self.paced:
            raised = scaled_up(
                refinement.batches,
                # uncapped by D: a device at D ends the raise, one at its own limit does not
                self._population.limits[attempt.cohort],
                self.largest,
                problem.budget_rows,
                lambda batches: float(problem.divergence(batches)) <= highest,
            )
            refinement = Refinement.of(raised, problem)
        durations = None
        if self._paces is not None:
            durations = self._paces.of_cohort(attempt.cohort).durations(refinement.batches)
        names = [self._population.names[index] for index in attempt.cohort.tolist()]
        return ControlPlan(
            cohort=dict(zip(names, refinement.batches.tolist(), strict=True)),
            divergence=refinement.divergence,
            selected_divergence=float(problem.divergence(problem.batches)),
            feasible=refinement.feasible,
            start_batch=attempt.start_batch,
            seconds=None if durations is None else float(durations.max()),
            idle_share=None if durations is None else idle_share(durations),
        )
