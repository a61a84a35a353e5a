from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise, product
from pathlib import Path
from random import Random
from statistics import mean
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spinecli.federation.deadline_planner import Choice, MenuSettings, plan_under_deadline, pruning_menu
from spinecli.federation.time_model import TimeModel, TimeModelState, nonnegative_ridge, shared_shape

SEEDS = st.integers(0, 9999)
RANKS = (4, 8, 16, 32)
Truth = tuple[float, float, float]


def seconds_of(truth: Truth, ratio: float, rank: int) -> float:
    return truth[0] * (1 - ratio) + truth[1] * rank / 32 + truth[2]


def observed(truths: dict[str, Truth], visits: int, seed: int, jitter: float = 0.0) -> TimeModel:
    model, generator = TimeModel(32), Random(seed)
    for _, (name, truth) in product(range(visits), truths.items()):
        ratio, rank = generator.uniform(0, 0.5), generator.choice(RANKS)
        model.observe(name, ratio, rank, seconds_of(truth, ratio, rank) * (1 + generator.uniform(-jitter, jitter)))
    return model


def relative_errors(model: TimeModel, name: str, truth: Truth) -> list[float]:
    return [
        abs(model.seconds(name, ratio, rank) / seconds_of(truth, ratio, rank) - 1)
        for ratio in (0.0, 0.25, 0.5)
        for rank in RANKS
    ]


@given(seed=SEEDS, data=st.data())
def test_ridge_over_non_negative_coefficients_is_optimal(seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(data.draw(st.integers(1, 6)), 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(len(rows), generator=generator, dtype=torch.float64)
    gram, right, center, weight = rows.T @ rows, rows.T @ targets, (0.2, 0.5, 0.1), 0.05
    found = torch.tensor(nonnegative_ridge(gram.tolist(), right.tolist(), center, weight), dtype=torch.float64)
    gradient = gram @ found - right + weight * (found - torch.tensor(center, dtype=torch.float64))
    assert (found >= 0).all()
    assert (gradient[found == 0] >= -1e-9).all()
    assert (gradient[found > 0].abs() <= 1e-9).all()


@given(seed=SEEDS)
def test_devices_of_one_kind_are_predicted_after_two_visits_each(seed: int) -> None:
    truths: dict[str, Truth] = {f"device-{i}": (2.0 * s, 1.0 * s, 0.5 * s) for i, s in enumerate([0.5, 1, 2, 4] * 5)}
    model = observed(truths, 2, seed)
    for name, truth in truths.items():
        assert max(relative_errors(model, name, truth)) < 0.15


@given(seed=SEEDS)
def test_a_device_unlike_the_fleet_is_predicted_after_some_visits(seed: int) -> None:
    truths: dict[str, Truth] = {f"device-{i}": (2.0, 0.2, 0.1) for i in range(5)} | {"odd": (0.2, 2.0, 0.1)}
    early, late = (mean(relative_errors(observed(truths, visits, seed), "odd", truths["odd"])) for visits in (1, 15))
    assert late < 0.4
    assert late < early


def test_slow_devices_at_low_ranks_do_not_make_low_ranks_look_slow() -> None:
    model, truths = TimeModel(32), {"slow": (8.0, 4.0, 2.0), "fast": (2.0, 1.0, 0.5)}
    generator = Random(0)
    for _ in range(10):
        for name, ranks in (("slow", (4, 8)), ("fast", (16, 32))):
            ratio, rank = generator.uniform(0, 0.5), generator.choice(ranks)
            model.observe(name, ratio, rank, seconds_of(truths[name], ratio, rank))
    for name, truth in truths.items():
        assert max(relative_errors(model, name, truth)) < 0.1


def test_a_device_never_seen_is_the_mean_of_the_fleet() -> None:
    model = observed({"a": (1.0, 1.0, 1.0), "b": (3.0, 3.0, 3.0)}, 3, 0)
    assert model.seconds("c", 0.2, 8) == pytest.approx(seconds_of((2.0, 2.0, 2.0), 0.2, 8), rel=0.01)
    assert (model.visits("a"), model.visits("c")) == (3, 0)
    assert TimeModel(32).seconds("c", 0.2, 8) > 0


@given(
    visits=st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0, 0.9), st.sampled_from(RANKS), st.floats(1e-3, 1e4)),
        max_size=12,
    ),
    ratio=st.floats(0, 0.99),
    more=st.floats(0, 0.99),
)
def test_whatever_was_seen_predictions_are_positive_and_monotone(
    visits: list[tuple[str, float, int, float]], ratio: float, more: float
) -> None:
    model = TimeModel(32)
    for visit in visits:
        model.observe(*visit)
    low, high = sorted([ratio, more])
    for device in "abcd":
        assert min(model.coefficients(device)) >= 0
        assert model.seconds(device, high, 8) <= model.seconds(device, low, 8) * (1 + 1e-12)
        assert model.seconds(device, low, 4) <= model.seconds(device, low, 32) * (1 + 1e-12)
        assert model.seconds(device, low, 32) > 0


def test_a_device_that_has_slowed_down_is_noticed() -> None:
    model = observed({"a": (1.0, 1.0, 1.0), "b": (1.0, 1.0, 1.0)}, 30, 0)
    for rank in (8, 16, 32, 4, 8, 16):
        model.observe("a", 0.2, rank, 3 * seconds_of((1.0, 1.0, 1.0), 0.2, rank))
    assert model.seconds("a", 0.2, 16) / model.seconds("b", 0.2, 16) == pytest.approx(3, rel=0.3)


@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
def test_predictions_follow_the_unit_of_time(seed: int, scale: float) -> None:
    truths: dict[str, Truth] = {"a": (2.0, 1.0, 0.5), "b": (1.0, 3.0, 0.1)}
    scaled: dict[str, Truth] = {name: (t[0] * scale, t[1] * scale, t[2] * scale) for name, t in truths.items()}
    one, other = observed(truths, 3, seed, 0.1), observed(scaled, 3, seed, 0.1)
    assert other.seconds("a", 0.3, 16) == pytest.approx(one.seconds("a", 0.3, 16) * scale, rel=1e-6)


def test_the_parts_of_the_shape_sum_to_one() -> None:
    shape, scales = shared_shape(observed({"a": (2.0, 1.0, 1.0), "b": (4.0, 2.0, 2.0)}, 8, 0).state.devices, 1e-6)
    assert shape == pytest.approx((0.5, 0.25, 0.25), abs=1e-3)
    assert scales["a"] == pytest.approx(4, rel=1e-3)


@given(seed=SEEDS)
def test_a_model_that_was_written_and_read_predicts_the_same(seed: int) -> None:
    model = observed({"c": (2.0, 1.0, 0.5), "b": (1.0, 3.0, 0.1), "a": (0.7, 0.2, 0.3)}, 4, seed, 0.1)
    written = json.dumps(model.state.model_dump(mode="json"), sort_keys=True)
    other = TimeModel(32, state=TimeModelState.model_validate(json.loads(written)))
    for learner in (model, other):
        learner.observe("a", 0.1, 8, 2.5)
    assert other.state == model.state
    assert other.seconds("b", 0.3, 16) == model.seconds("b", 0.3, 16)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="finite and positive"):
        TimeModel(32).observe("a", 0.1, 8, seconds)


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"largest_rank": 0}, {"keep": 0.0}, {"keep": 1.1}, {"prior": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            TimeModel(**{"largest_rank": 32, **wrong})


CHOICES = st.builds(Choice, st.just(0.0), st.just(4), gain=st.floats(0, 1), seconds=st.integers(1, 20).map(float))
MENUS = st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4)


@given(menus=MENUS)
def test_the_plan_has_the_most_gain_per_second_of_all(menus: list[list[Choice]]) -> None:
    def rate(choices: tuple[Choice, ...]) -> float:
        return sum(choice.gain for choice in choices) / max(choice.seconds for choice in choices)

    plan = plan_under_deadline(menus)
    assert all(choice in menu for choice, menu in zip(plan.choices, menus, strict=True))
    assert rate(plan.choices) == pytest.approx(max(rate(choices) for choices in product(*menus)))
    assert 0 <= plan.idle_share < 1
    assert plan.deadline == max(choice.seconds for choice in plan.choices)


def test_a_plan_for_nobody_is_refused() -> None:
    for menus in ([], [[]]):
        with pytest.raises(ValueError, match="at least one"):
            plan_under_deadline(menus)


@given(
    ratio=st.floats(0, 0.6),
    target=st.floats(0, 0.6),
    visits=st.floats(0.2, 12),
    largest=st.floats(0.02, 0.3),
)
def test_a_menu_never_falls_and_never_passes_the_target(
    ratio: float, target: float, visits: float, largest: float
) -> None:
    settings = MenuSettings(largest_step=largest)
    menu = pruning_menu(TimeModel(32), "a", ratio, target, visits, settings)
    assert {choice.rank for choice in menu} == set(settings.ranks)
    for choice in menu:
        assert ratio <= choice.ratio <= max(target, ratio) + 1e-12
        pace = max(target - ratio, 0) / max(visits, 1)
        assert choice.ratio - ratio <= max(largest, pace) + 1e-12
    best = max(menu, key=lambda choice: choice.gain)
    assert best.rank == 32


@hypothesis_settings(max_examples=30)
@given(target=st.floats(0.1, 0.7), visits=st.integers(1, 10), seed=SEEDS)
def test_whatever_is_chosen_the_target_is_reached_at_the_last_visit(target: float, visits: int, seed: int) -> None:
    generator, ratio, model = Random(seed), 0.0, TimeModel(32)
    for left in range(visits, 0, -1):
        ratio = generator.choice(pruning_menu(model, "a", ratio, target, left, MenuSettings())).ratio
    assert ratio == pytest.approx(target)


def test_a_slow_device_is_given_less_and_a_fast_one_more() -> None:
    model = observed({"slow": (6.0, 3.0, 1.0), "fast": (2.0, 1.0, 0.3)}, 10, 0)
    menus = [pruning_menu(model, name, 0.1, 0.5, 6, MenuSettings()) for name in ("slow", "fast")]
    slow, fast = plan_under_deadline(menus).choices
    assert slow.rank < fast.rank
    assert slow.ratio >= fast.ratio


@pytest.fixture(scope="module")
def planners() -> ModuleType:
    """The benchmark, whose toy fleet this is."""
    path = Path(__file__).parents[2] / "benchmarks" / "planners.py"
    spec = importlib.util.spec_from_file_location("benchmark_planners", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_on_the_toy_fleet_the_model_beats_the_bandit_and_the_bandit_beats_chance(planners: ModuleType) -> None:
    outcomes = planners.table(rounds=100, seeds=3)

    def of(name: str, figure: str) -> float:
        return mean(getattr(outcome, figure) for outcome in outcomes[name])

    order = ["linear time model, common deadline", "S-UCB", "uniform random"]
    for better, worse in pairwise(order):
        assert of(better, "seconds") < of(worse, "seconds")
        assert of(better, "idle_share") < of(worse, "idle_share")
        assert of(better, "gain_per_second") > of(worse, "gain_per_second")


def test_the_toy_fleet_gives_the_same_table_every_time(planners: ModuleType) -> None:
    assert planners.table(rounds=10, seeds=1) == planners.table(rounds=10, seeds=1)
