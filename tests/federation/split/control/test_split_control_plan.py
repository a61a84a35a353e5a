from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from control_cases import PACES, skewed_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from spinecli.config import Config
from spinecli.errors import OptionError
from spinecli.federation.config import SplitConfig, TrainConfig
from spinecli.federation.split.control.estimates import Pace, Population
from spinecli.federation.split.control.plan import ControlOptions, ControlPlan, ControlState, plan_round

_SIDES: dict[str, type[Config]] = {"split": SplitConfig, "train": TrainConfig}


def controlled(**changes: Any) -> ControlOptions:
    """Options by the names of fields, with room for many devices."""
    values = {"budget_rows": 200.0, "cohort": 20, **changes}
    sides = {
        side: kind(**{name: values.pop(name) for name in list(values) if name in kind.model_fields})
        for side, kind in _SIDES.items()
    }
    return ControlOptions(**sides, **values)


OPTIONS = controlled()


def population(devices: int = 30, seed: int = 0, labels: int = 10) -> Population:
    names = tuple(f"device-{index:02d}" for index in range(devices))
    return Population(names, ("fast", "slow") * (devices // 2), skewed_counts(devices, labels, seed, per_device=100))


def known(devices: Population, seed: int = 0) -> ControlState:
    figures = torch.rand(len(devices.names), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    paces = {
        name: Pace(0.01 + row[0], 0.01 + row[1], 0.1 * row[2])
        for name, row in zip(devices.names, figures.tolist(), strict=True)
    }
    return ControlState(paces=paces)


def seconds_of(plan: ControlPlan, state: ControlState) -> list[float]:
    return [
        rows * state.paces[name].row_seconds + state.paces[name].fixed_seconds for name, rows in plan.cohort.items()
    ]


@pytest.mark.parametrize("selection", ["greedy", "genetic", "priority", "random"])
@pytest.mark.parametrize("budget", [3.0, 40.5, 200.0, math.inf])
def test_a_plan_keeps_its_limits_and_predicts_what_follows_from_the_paces(selection: str, budget: float) -> None:
    devices = population()
    state = known(devices)
    for round_number in range(3):
        options = controlled(selection=selection, budget_rows=budget)
        plan = plan_round(state, devices, options, 1, round_number)
        assert 1 <= len(plan.cohort) <= 20
        assert plan.rows <= budget
        assert all(1 <= rows <= 64 for rows in plan.cohort.values())
        assert list(plan.cohort) == sorted(plan.cohort)
        assert plan.feasible == (plan.divergence <= 0.05)
        seconds = seconds_of(plan, state)
        assert plan.seconds == pytest.approx(max(seconds))
        assert plan.idle_share == pytest.approx(1 - sum(seconds) / len(seconds) / max(seconds))
        assert plan == plan_round(state, devices, options, 1, round_number)


def test_the_seed_and_the_round_decide_the_draw() -> None:
    devices = population()
    plans = [plan_round(ControlState(), devices, OPTIONS, seed, number) for seed, number in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(plan.cohort) for plan in plans}) == 3


def test_regulated_batches_wait_less_than_equal_ones_and_mix_better_than_random_ones() -> None:
    devices = population()
    state = known(devices)
    for number in range(5):
        full = plan_round(state, devices, OPTIONS, 0, number)
        plain = plan_round(state, devices, controlled(selection="random", regulation=False), 0, number)
        assert full.idle_share is not None
        assert plain.idle_share is not None
        assert full.idle_share < 0.5 * plain.idle_share
        assert full.feasible
        assert full.divergence < plain.divergence


def test_before_anyone_is_known_batches_are_equal_unless_labels_demand_otherwise() -> None:
    devices = population(labels=1)
    plan = plan_round(ControlState(), devices, OPTIONS, 0, 0)
    assert set(plan.cohort.values()) == {16}
    assert len(plan.cohort) == 12
    assert plan.seconds is None
    assert plan.idle_share is None
    skewed = plan_round(ControlState(), population(), OPTIONS, 0, 0)
    assert skewed.feasible


def test_without_regulation_batches_stay_equal_even_if_labels_do_not_mix() -> None:
    devices = population()
    options = controlled(regulation=False, selection="random", cohort=2)
    plan = plan_round(known(devices), devices, options, 0, 0)
    assert set(plan.cohort.values()) == {16}
    assert not plan.feasible
    assert plan.divergence == plan.selected_divergence
    assert plan.seconds is not None


def test_where_large_batches_leave_no_room_for_all_labels_smaller_ones_do() -> None:
    names = [f"device-{index}" for index in range(20)]
    devices = Population(names, ["same"] * 20, 100 * torch.eye(10, dtype=torch.int64).repeat(2, 1))
    state = ControlState(paces={name: Pace(0.1, 0.1, 0.0) for name in names})
    plan = plan_round(state, devices, controlled(budget_rows=256.0), 0, 0)
    assert plan.start_batch < 64
    assert plan.feasible
    assert len(plan.cohort) >= 10
    # what is saved on each is given back to all
    assert plan.rows > 200
    assert plan_round(state, devices, controlled(budget_rows=1280.0), 0, 0).start_batch == 64


def test_a_cohort_too_small_for_the_labels_is_infeasible_and_its_limit_is_not_relaxed() -> None:
    devices = population()
    plan = plan_round(known(devices), devices, controlled(cohort=2), 0, 0)
    assert not plan.feasible
    assert plan.divergence > 0.05
    assert len(plan.cohort) == 2


def test_without_labels_the_plan_follows_priority_and_budget() -> None:
    devices = population(labels=1)
    state = known(devices)
    rare = devices.names[3]
    state = ControlState(paces=state.paces, participations={name: 10**6 for name in devices.names if name != rare})
    for selection in ("greedy", "genetic", "priority"):
        for number in range(5):
            plan = plan_round(state, devices, controlled(selection=selection), 0, number)
            assert rare in plan.cohort
            assert plan.divergence == 0.0
            assert plan.feasible
            assert plan.rows <= 200


def test_nobody_gets_more_rows_than_it_has_examples_or_memory_for() -> None:
    counts = skewed_counts(10, 2, 0, per_device=100)
    counts[0] = torch.tensor([2, 1])
    memory = torch.tensor([64] * 5 + [7] * 5)
    devices = Population([str(index) for index in range(10)], ["same"] * 10, counts, memory)
    options = ControlOptions()
    for state in (ControlState(), ControlState(paces={"3": Pace(0.1, 0.1, 0.1)})):
        plan = plan_round(state, devices, options, 0, 0)
        assert len(plan.cohort) == 10
        assert plan.cohort["0"] <= 3
        assert all(plan.cohort[str(index)] <= 7 for index in range(5, 10))


def test_every_device_takes_part_in_the_long_run() -> None:
    devices = population()
    state = known(devices)
    for number in range(40):
        plan = plan_round(state, devices, OPTIONS, 0, number)
        state = state.after_round({}, plan.cohort)
    assert min(state.participations.get(name, 0) for name in devices.names) >= 1


@given(st.dictionaries(st.text(max_size=5), PACES), st.dictionaries(st.text(max_size=5), st.integers(0, 99)))
@settings(max_examples=40)
def test_the_state_survives_json_to_the_last_bit(paces: dict[str, Pace], participations: dict[str, int]) -> None:
    state = ControlState(paces=paces, participations=participations)
    assert ControlState.model_validate(json.loads(json.dumps(state.values()))) == state


def test_a_resumed_run_plans_the_same() -> None:
    devices = population()
    state = known(devices).after_round({}, devices.names[:7])
    again = ControlState.model_validate(json.loads(json.dumps(state.values())))
    assert plan_round(again, devices, OPTIONS, 5, 9) == plan_round(state, devices, OPTIONS, 5, 9)


@pytest.mark.parametrize("damage", [{"compute_seconds": -1.0}, {"transfer_seconds": math.nan}, {"more": 1.0}])
def test_a_damaged_state_is_refused(damage: dict[str, float]) -> None:
    values = {"compute_seconds": 1.0, "transfer_seconds": 1.0, "fixed_seconds": 1.0, **damage}
    with pytest.raises(ValidationError):
        ControlState.model_validate({"paces": {"a": values}, "participations": {}})


def test_only_completed_rounds_count_and_the_first_observation_is_taken_as_it_is() -> None:
    state = ControlState(participations={"a": 2})
    after = state.after_round({"a": Pace(1, 1, 1), "b": Pace(2, 2, 2), "c": None}, ["a"])
    assert after.participations == {"a": 3}
    assert after.paces == {"a": Pace(1, 1, 1), "b": Pace(2, 2, 2)}
    assert after.after_round({"a": Pace(2, 1, 0)}, []).paces["a"] == Pace(0.8 * 1 + (1 - 0.8) * 2, 1, 0.8)
    assert state == ControlState(participations={"a": 2})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget_rows": 0.5}, "--ingress holds"),
        ({"budget_rows": math.nan}, "--ingress holds"),
    ],
    ids=str,
)
def test_a_server_that_takes_no_row_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        controlled(**change)


@pytest.mark.parametrize(
    "parts",
    [
        ((), (), torch.zeros(0, 2, dtype=torch.int64), None),
        (("a",), ("x", "y"), torch.ones(1, 2, dtype=torch.int64), None),
        (("a",), ("x",), torch.zeros(1, 2, dtype=torch.int64), None),
        (("a",), ("x",), torch.ones(1, 2, dtype=torch.int64), torch.tensor([0])),
    ],
    ids=["empty", "lengths", "no example", "no memory"],
)
def test_an_impossible_population_is_refused(parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Population(*parts)
