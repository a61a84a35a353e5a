from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from control_cases import candidates, skewed_candidates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spinecli.errors import OptionError
from spinecli.federation.split.control.batches import priorities
from spinecli.federation.split.control.selection.candidates import Candidates, Selection, drawn_orders, filled, trimmed
from spinecli.federation.split.control.selection.genetic import GeneticSelection
from spinecli.federation.split.control.selection.greedy import GreedySelection
from spinecli.federation.split.control.selection.registry import (
    SELECTIONS,
    PrioritySelection,
    RandomSelection,
    selection_of,
)

SEEDS = st.integers(0, 2**32)
SEARCHES: dict[str, Selection] = {"greedy": GreedySelection(), "genetic": GeneticSelection()}
every = pytest.mark.parametrize("name", SELECTIONS)
search = pytest.mark.parametrize("name", SEARCHES)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_cohort(chosen: Tensor, devices: int) -> Tensor:
    return torch.zeros(devices, dtype=torch.bool).index_fill(0, chosen, True)[None]


def divergence_of(chosen: Tensor, found: Candidates) -> float:
    return float(found.divergences(as_cohort(chosen, found.devices))[0])


@every
@given(found=candidates(), seed=SEEDS)
@settings(max_examples=40)
def test_every_selection_keeps_budget_and_size_and_chooses_somebody(name: str, found: Candidates, seed: int) -> None:
    chosen = selection_of(name).select(found, generator(seed))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert bool(found.fits(as_cohort(chosen, found.devices))[0])
    assert torch.equal(chosen, selection_of(name).select(found, generator(seed)))


@given(found=candidates(), seed=SEEDS)
@settings(max_examples=60)
def test_greedy_is_never_farther_than_the_feasible_cohort_that_was_drawn_first(found: Candidates, seed: int) -> None:
    drawn = PrioritySelection().select(found, generator(seed))
    chosen = GreedySelection(starts=1).select(found, generator(seed))
    assert divergence_of(chosen, found) <= divergence_of(drawn, found) + 1e-12


@given(found=candidates(), seed=SEEDS)
@settings(max_examples=40)
def test_genetic_is_never_farther_than_any_feasible_cohort_of_its_first_population(
    found: Candidates, seed: int
) -> None:
    orders = drawn_orders(found.priorities, 20, generator(seed))
    first = filled(torch.zeros_like(orders, dtype=torch.bool), orders, found)
    assert bool(found.fits(first).all())
    chosen = GeneticSelection().select(found, generator(seed))
    assert divergence_of(chosen, found) <= float(found.divergences(first).min()) + 1e-12


@search
@pytest.mark.parametrize("devices", [30, 300])
def test_searches_come_far_closer_than_random_cohorts_of_the_same_budget(name: str, devices: int) -> None:
    for seed in range(3):
        found = skewed_candidates(devices, seed, budget_rows=150.0, largest_cohort=20)
        random = [divergence_of(RandomSelection().select(found, generator(draw)), found) for draw in range(20)]
        reached = divergence_of(SEARCHES[name].select(found, generator(seed)), found)
        assert reached <= min(random)
        assert reached < 0.5 * sum(random) / len(random)


@pytest.mark.parametrize("name", ["greedy", "genetic", "priority"])
def test_over_many_rounds_every_device_takes_part(name: str) -> None:
    devices, cohort = 40, 5
    taken = torch.zeros(devices, dtype=torch.int64)
    for round_number in range(80):
        found = skewed_candidates(devices, 3, budget_rows=100.0, largest_cohort=cohort, participations=taken)
        taken[selection_of(name).select(found, generator(round_number))] += 1
    assert int(taken.min()) >= 1
    assert int(taken.max()) < 40


def test_descent_without_priorities_would_leave_devices_out() -> None:
    devices = 40
    taken = torch.zeros(devices, dtype=torch.int64)
    pure = GreedySelection(kept_share=0.0, pool=devices, starts=1)
    for round_number in range(80):
        found = skewed_candidates(devices, 3, budget_rows=100.0, largest_cohort=5)
        taken[pure.select(found, generator(round_number))] += 1
    spread_without = float(taken.double().std())
    taken = torch.zeros(devices, dtype=torch.int64)
    for round_number in range(80):
        found = skewed_candidates(devices, 3, budget_rows=100.0, largest_cohort=5, participations=taken)
        taken[GreedySelection().select(found, generator(round_number))] += 1
    assert float(taken.double().std()) < spread_without


def test_kept_seats_are_the_first_that_were_drawn() -> None:
    taken = torch.full((30,), 10**6)
    taken[7] = 0
    found = skewed_candidates(30, 0, budget_rows=100.0, largest_cohort=6, participations=taken)
    for seed in range(20):
        assert 7 in GreedySelection().select(found, generator(seed)).tolist()


@every
def test_without_labels_priority_and_budget_decide(name: str) -> None:
    devices = 20
    ones = torch.ones(devices, 1, dtype=torch.float64)
    taken = torch.tensor([0] * 5 + [10**6] * 15)
    found = Candidates(torch.full((devices,), 4), ones, ones[0], priorities(taken), 22.0, 10)
    chosen = selection_of(name).select(found, generator(0)).tolist()
    assert len(chosen) == 5
    if name != "random":
        assert chosen == [0, 1, 2, 3, 4]
    assert divergence_of(torch.tensor(chosen), found) == 0.0


@search
def test_where_everybody_fits_everybody_takes_part(name: str) -> None:
    found = skewed_candidates(12, 0)
    assert SEARCHES[name].select(found, generator(0)).tolist() == list(range(12))


@every
def test_a_budget_for_one_device_gives_a_cohort_of_one(name: str) -> None:
    found = replace(skewed_candidates(12, 0), batches=torch.full((12,), 8), budget_rows=9.5)
    assert len(selection_of(name).select(found, generator(0))) == 1


@given(found=candidates(), seed=SEEDS, data=st.data())
def test_trimming_drops_the_last_and_filling_leaves_no_room_for_anyone(
    found: Candidates, seed: int, data: st.DataObject
) -> None:
    bits = st.lists(st.booleans(), min_size=found.devices, max_size=found.devices)
    cohorts = torch.tensor(data.draw(st.lists(bits, min_size=3, max_size=3)))
    orders = drawn_orders(found.priorities, 3, generator(seed))
    kept = trimmed(cohorts, orders, found)
    full = filled(kept, orders, found)
    assert bool(found.fits(full).all())
    for before, after, done, order in zip(cohorts.tolist(), kept.tolist(), full.tolist(), orders.tolist(), strict=True):
        members = [device for device in order if before[device]]
        staying = [device for device in order if after[device]]
        assert members[: len(staying)] == staying
        rows, size = sum(int(found.batches[device]) for device in staying), len(staying)
        for device in order:  # one by one, as the definition says
            batch = int(found.batches[device])
            if device not in staying and rows + batch <= found.budget_rows and size < found.largest_cohort:
                staying.append(device)
                rows, size = rows + batch, size + 1
        assert sorted(staying) == [device for device in range(found.devices) if done[device]]


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    first = drawn_orders(weights, 20_000, generator(0))[:, 0]
    shares = torch.bincount(first, minlength=3) / len(first)
    assert shares.tolist() == pytest.approx([0.125, 0.25, 0.625], abs=0.02)


@pytest.mark.parametrize(
    "change", [{"budget_rows": 0.5}, {"largest_cohort": 0}, {"priorities": torch.ones(3)}], ids=str
)
def test_impossible_candidates_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"budget|at least one|different"):
        replace(skewed_candidates(12, 0), **change)


def test_an_infinite_budget_is_no_limit_and_an_unknown_selection_is_told() -> None:
    assert skewed_candidates(5, 0, budget_rows=math.inf).most_rows > 10**12
    with pytest.raises(OptionError, match="'best' is not one of greedy, genetic"):
        selection_of("best")
