from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from control_cases import problems, skewed_counts
from hypothesis import given, settings
from hypothesis import strategies as st

from spinecli.federation.split.control.estimates import label_distributions, reference_distribution
from spinecli.federation.split.control.refinement import Problem, refined, relaxed_batches


def two_labels(batches: list[int], limits: list[int], budget: float = math.inf, limit: float = 0.05) -> Problem:
    """One device for each of two labels, equally fast."""
    return Problem(
        torch.tensor(batches),
        torch.eye(2, dtype=torch.float64),
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.ones(2, dtype=torch.float64),
        torch.tensor(limits),
        budget,
        limit,
    )


def optimum(problem: Problem) -> float | None:
    """The smallest change of all that are allowed, by trying every one of them; None if none is."""
    everything = torch.tensor(list(product(*(range(1, limit + 1) for limit in problem.limits.tolist()))))
    everything = everything[everything.sum(dim=1) <= problem.most_rows]
    allowed = everything[problem.divergence(everything) <= problem.divergence_limit]
    return min((problem.change(batches) for batches in allowed), default=None)


@given(problems())
@settings(max_examples=80, deadline=None)
def test_refinement_keeps_every_limit_and_says_whether_it_reached_the_divergence(problem: Problem) -> None:
    found = refined(problem)
    assert bool((found.batches >= 1).all())
    assert bool((found.batches <= problem.limits).all())
    assert int(found.batches.sum()) <= problem.budget_rows
    assert found.divergence == float(problem.divergence(found.batches))
    assert found.feasible == (found.divergence <= problem.divergence_limit)
    before = float(problem.divergence(problem.batches))
    if before <= problem.divergence_limit:
        assert torch.equal(found.batches, problem.batches)
    else:
        assert found.divergence <= before
    assert torch.equal(refined(problem).batches, found.batches)


@given(problems(most_devices=3))
@settings(max_examples=60, deadline=None)
def test_what_exhaustive_search_cannot_reach_is_not_claimed(problem: Problem) -> None:
    found, best = refined(problem), optimum(problem)
    if best is None:
        assert not found.feasible
    elif found.feasible:
        assert problem.change(found.batches) >= best - 1e-9


def test_it_finds_what_can_be_found_at_nearly_the_least_change() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(60):
        weights = torch.rand(3, 3, generator=generator, dtype=torch.float64) ** 4 + 1e-3
        limits = torch.randint(1, 9, (3,), generator=generator)
        batches = (torch.rand(3, generator=generator) * limits).long() + 1
        problem = Problem(
            batches,
            weights / weights.sum(dim=1, keepdim=True),
            torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
            torch.rand(3, generator=generator, dtype=torch.float64) + 0.1,
            limits,
            float(batches.sum()) + 3,
            0.05,
        )
        best, found = optimum(problem), refined(problem)
        assert found.feasible == (best is not None)
        if best:
            ratios.append(problem.change(found.batches) / best)
    assert len(ratios) > 10
    assert sum(ratios) / len(ratios) < 1.1


def test_a_label_that_nobody_in_the_cohort_has_is_infeasible_and_the_limit_stays() -> None:
    problem = replace(
        two_labels([10, 30], [64, 64], limit=0.01),
        distributions=torch.eye(3, dtype=torch.float64)[:2],
        reference=torch.full((3,), 1 / 3, dtype=torch.float64),
    )
    found = refined(problem)
    assert not found.feasible
    # without the third label, log(3/2) is the least there is
    assert found.divergence == pytest.approx(math.log(1.5), abs=1e-3)
    assert int(found.batches[0]) == int(found.batches[1])


def test_by_hand_rows_go_where_they_must_and_no_farther() -> None:
    found = refined(two_labels([10, 40], [64, 64]))
    assert found.feasible
    for step in ([-1, 0], [0, 1]):  # a row back is too far
        nearer = found.batches + torch.tensor(step)
        assert float(two_labels([10, 40], [64, 64]).divergence(nearer)) > 0.05
    assert refined(two_labels([64, 10], [64, 64], limit=0.0)).divergence == 0.0
    capped = refined(two_labels([5, 40], [5, 64], limit=0.0))
    assert capped.batches.tolist() == [5, 5]
    full = refined(two_labels([10, 40], [64, 64], budget=50.0))
    assert full.feasible
    assert int(full.batches.sum()) <= 50
    assert refined(two_labels([1, 3], [1, 3], budget=4.0, limit=0.0)).batches.tolist() == [1, 1]


def test_slow_devices_are_changed_less() -> None:
    counts = torch.tensor([[10, 0], [10, 0], [0, 10], [0, 10]])
    distributions = label_distributions(counts)
    problem = Problem(
        torch.tensor([40, 40, 10, 10]),
        distributions,
        reference_distribution(distributions),
        torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64),
        torch.full((4,), 64),
        math.inf,
        0.02,
    )
    found = refined(problem)
    assert found.feasible
    change = (found.batches - problem.batches).abs().tolist()
    assert change[1] == change[3] == 0
    assert change[0] + change[2] > 0


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_renaming_devices_renames_relaxed_batches(seed: int) -> None:
    distributions = label_distributions(skewed_counts(10, 6, seed))
    draw = torch.Generator().manual_seed(seed)
    problem = Problem(
        torch.randint(1, 20, (10,), generator=draw),
        distributions,
        reference_distribution(distributions),
        torch.rand(10, generator=draw, dtype=torch.float64) + 0.1,
        torch.full((10,), 40),
        math.inf,
        0.02,
    )
    order = torch.randperm(10, generator=draw)
    other = replace(
        problem,
        batches=problem.batches[order],
        distributions=distributions[order],
        row_seconds=problem.row_seconds[order],
    )
    for one, permuted in zip(relaxed_batches(problem), relaxed_batches(other), strict=True):
        assert torch.allclose(one[order], permuted, rtol=1e-6)


def test_large_cohorts_are_refined_too() -> None:
    distributions = label_distributions(skewed_counts(300, 10, 0))
    weights = distributions @ torch.linspace(0.0, 2.0, 10, dtype=torch.float64) ** 3
    problem = Problem(
        (weights * 10).long().clamp(1, 64),
        distributions,
        reference_distribution(distributions),
        torch.linspace(0.1, 1.0, 300, dtype=torch.float64),
        torch.full((300,), 64),
        1e5,
        0.02,
    )
    assert float(problem.divergence(problem.batches)) > 0.1
    found = refined(problem)
    assert found.feasible
    # the cheap devices carry the change
    change = (found.batches - problem.batches).abs().double()
    assert float(change[:150].sum()) > 2 * float(change[150:].sum())


@pytest.mark.parametrize(("batches", "budget"), [([5, 5], 9.0), ([65, 1], 100.0), ([0, 5], 100.0)])
def test_batches_beyond_their_bounds_are_no_problem_to_start_from(batches: list[int], budget: float) -> None:
    with pytest.raises(ValueError, match="beyond the budget"):
        two_labels(batches, [64, 64], budget=budget)
