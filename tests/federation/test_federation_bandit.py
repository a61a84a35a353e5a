from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spinecli.federation.bandit import (
    BanditSettings,
    BanditState,
    Interval,
    Leaf,
    RewardSettings,
    SmoothUCB,
    kept_importance,
    reward,
)

SEEDS = st.integers(0, 9999)
LINE = (Interval(0.0, 1.0),)
PLANE = (Interval(0.0, 0.7), Interval(4.0, 32.0))
ONE_SIDE = BanditSettings(granularity=(0.1,))
E_UCB = BanditSettings(exploration=1.0, smoothness=0.0, inherited=0.0, jitter=0.5)
EVERY_SETTING = pytest.mark.parametrize("settings", [BanditSettings(), E_UCB], ids=["smooth", "e-ucb"])


def played(settings: BanditSettings, seed: int, rewards: list[float]) -> SmoothUCB:
    learner, generator = SmoothUCB(PLANE, settings), Random(seed)
    for value in rewards:
        learner.observe(learner.pick(generator), value)
    return learner


def volume(leaf: Leaf) -> float:
    return math.prod(side.width / whole.width for side, whole in zip(leaf.box, PLANE, strict=True))


@EVERY_SETTING
@given(seed=SEEDS, rewards=st.lists(st.floats(-1e6, 1e6), max_size=80), data=st.data())
def test_leaves_always_partition_the_space(
    settings: BanditSettings, seed: int, rewards: list[float], data: st.DataObject
) -> None:
    leaves = played(settings, seed, rewards).leaves
    assert sum(volume(leaf) for leaf in leaves) == pytest.approx(1)
    anywhere = tuple(
        data.draw(st.one_of(st.floats(side.low, side.high), st.sampled_from([leaf.box[d].low for leaf in leaves])))
        for d, side in enumerate(PLANE)
    )
    assert sum(leaf.contains(anywhere, PLANE) for leaf in leaves) == 1
    corner = tuple(side.high for side in PLANE)
    assert sum(leaf.contains(corner, PLANE) for leaf in leaves) == 1
    for one, other in [(a, b) for a in leaves for b in leaves if a is not b]:
        overlaps = [min(x.high, y.high) - max(x.low, y.low) for x, y in zip(one.box, other.box, strict=True)]
        assert min(overlaps) <= 0


@EVERY_SETTING
@hypothesis_settings(max_examples=8)
@given(seed=SEEDS)
def test_boxes_are_cut_until_they_are_small_and_no_further(settings: BanditSettings, seed: int) -> None:
    generator = Random(seed)
    leaves = played(settings, seed, [generator.random() for _ in range(150)]).leaves
    assert len(leaves) > 10
    for leaf in leaves:
        for side, whole, most in zip(leaf.box, PLANE, settings.granularity, strict=True):
            assert side.width / whole.width >= most / 4 * (1 - 1e-9)


@EVERY_SETTING
@given(seed=SEEDS, rewards=st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_picks_lie_in_the_space_and_change_nothing(settings: BanditSettings, seed: int, rewards: list[float]) -> None:
    learner = played(settings, seed, rewards)
    before = learner.state
    point = learner.pick(Random(seed))
    assert learner.pick(Random(seed)) == point
    assert learner.state == before
    assert all(side.low <= x <= side.high for x, side in zip(point, PLANE, strict=True))


@given(plays=st.integers(1, 60), discount=st.floats(0.5, 1.0))
def test_counts_are_discounted_and_none_is_lost_in_cutting(plays: int, discount: float) -> None:
    learner = played(BanditSettings(discount=discount), 0, [1.0] * plays)
    expected = sum(discount**age for age in range(plays))
    assert sum(leaf.count for leaf in learner.leaves) == pytest.approx(expected)
    assert sum(leaf.total for leaf in learner.leaves) == pytest.approx(expected / 2)


def test_a_cut_box_hands_its_statistics_to_both_halves() -> None:
    learner = SmoothUCB(LINE, ONE_SIDE)
    learner.observe((0.4,), 3.0)
    low, high = learner.leaves
    assert (low.box, high.box) == ((Interval(0.0, 0.4),), (Interval(0.4, 1.0),))
    assert (low.count, low.mean, high.count, high.mean) == (0.5, 0.5, 0.5, 0.5)


def test_a_box_is_cut_inside_its_middle_half() -> None:
    learner = SmoothUCB(LINE, ONE_SIDE)
    learner.observe((0.01,), 3.0)
    assert [leaf.box[0].high for leaf in learner.leaves] == [0.25, 1.0]


def test_the_side_furthest_above_its_granularity_is_cut() -> None:
    learner = SmoothUCB(PLANE, BanditSettings(granularity=(0.9, 0.1)))
    learner.observe((0.35, 18.0), 1.0)
    assert {leaf.box[0] for leaf in learner.leaves} == {PLANE[0]}
    assert len(learner.leaves) == 2


def test_the_upper_bound_is_the_documented_formula() -> None:
    settings = BanditSettings(exploration=0.3, smoothness=0.2, granularity=(0.1,), jitter=0.0)
    for counts, totals in [((4.0, 2.0), (2.0, 1.5)), ((30.0, 0.5), (15.0, 0.2)), ((1.0, 1.0), (0.9, 0.1))]:
        boxes = ((Interval(0.0, 0.5),), (Interval(0.5, 1.0),))
        leaves = tuple(Leaf(box=box, count=n, total=s) for box, n, s in zip(boxes, counts, totals, strict=True))
        plays = max(sum(counts), math.e)
        bounds = [
            s / n + 0.3 * math.sqrt(2 * math.log(plays) / n) + 0.2 * 0.5 for n, s in zip(counts, totals, strict=True)
        ]
        picked = SmoothUCB(LINE, settings, BanditState(leaves=leaves)).pick(Random(0))
        assert picked == ((0.25,) if bounds[0] > bounds[1] else (0.75,))


def test_an_unplayed_box_is_played_first() -> None:
    boxes = (Leaf(box=(Interval(0.0, 0.5),), count=9, total=9), Leaf(box=(Interval(0.5, 1.0),)))
    assert SmoothUCB(LINE, ONE_SIDE, BanditState(leaves=boxes)).pick(Random(0))[0] > 0.5


def bell(x: float, peak: float) -> float:
    return math.exp(-(((x - peak) / 0.2) ** 2) / 2)


def tent(x: float, peak: float) -> float:
    return 1 - abs(x - peak)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("peak", [0.08, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("landscape", [bell, tent])
def test_a_stationary_peak_is_found_within_ten_percent_in_300_plays(
    landscape: Callable[[float, float], float], peak: float, seed: int
) -> None:
    learner, generator = SmoothUCB(LINE, ONE_SIDE), Random(seed)
    assert learner.settings.exploration == 0.1
    for _ in range(300):
        point = learner.pick(generator)
        learner.observe(point, landscape(point[0], peak) + generator.gauss(0, 0.05))
    favourite = max(learner.leaves, key=lambda leaf: leaf.count).box[0]
    assert abs((favourite.low + favourite.high) / 2 - peak) <= 0.1


def test_a_peak_that_has_moved_is_found_again() -> None:
    learner, generator = SmoothUCB(LINE, BanditSettings(discount=0.95, granularity=(0.1,))), Random(1)
    for peak in (0.2, 0.8):
        for _ in range(300):
            point = learner.pick(generator)
            learner.observe(point, bell(point[0], peak))
        favourite = max(learner.leaves, key=lambda leaf: leaf.count).box[0]
        assert abs((favourite.low + favourite.high) / 2 - peak) <= 0.1


@EVERY_SETTING
@given(seed=SEEDS, rewards=st.lists(st.floats(-1e3, 1e3), max_size=40))
def test_a_learner_that_was_written_and_read_goes_on_alike(
    settings: BanditSettings, seed: int, rewards: list[float]
) -> None:
    learner = played(settings, seed, rewards)
    written = json.dumps(learner.state.model_dump(mode="json"))
    other = SmoothUCB(PLANE, settings, BanditState.model_validate(json.loads(written)))
    assert other.state == learner.state
    generators = Random(seed), Random(seed)
    for turn in range(20):
        points = learner.pick(generators[0]), other.pick(generators[1])
        assert points[0] == points[1]
        learner.observe(points[0], math.sin(turn))
        other.observe(points[1], math.sin(turn))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_refused_without_a_trace(value: float) -> None:
    learner = SmoothUCB(LINE, ONE_SIDE)
    before = learner.state
    with pytest.raises(ValueError, match="finite"):
        learner.observe((0.5,), value)
    assert learner.state == before


def test_points_and_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        SmoothUCB(LINE, ONE_SIDE).observe((1.5,), 1.0)
    with pytest.raises(ValueError, match="granularities"):
        SmoothUCB(LINE, BanditSettings())
    with pytest.raises(ValueError, match="upper end"):
        SmoothUCB((Interval(1.0, 1.0),), ONE_SIDE)
    for wrong in ({"discount": 0.0}, {"jitter": 0.6}, {"inherited": 0.7}, {"exploration": -1.0}, {"granularity": (0,)}):
        with pytest.raises(ValueError, match=r"must"):
            BanditSettings(**wrong)


BENEFIT = {"loss_before": 2.0, "loss_after": 1.5, "ratio_step": 0.4, "importance_kept": 0.9}


def test_the_reward_is_benefit_over_untimeliness() -> None:
    assert reward(**BENEFIT, seconds=12, mean_seconds=10) == pytest.approx((0.25 + 0.2 + 0.45) / (0.1 + 0.2))
    assert reward(**BENEFIT, seconds=10, mean_seconds=10) == pytest.approx(0.9 / 0.1)


@given(deviation=st.floats(0.001, 0.999))
def test_by_default_early_is_as_untimely_as_late_and_late_only_forgives_it(deviation: float) -> None:
    early, late = (reward(**BENEFIT, seconds=10 * (1 + d), mean_seconds=10) for d in (-deviation, deviation))
    on_time = reward(**BENEFIT, seconds=10, mean_seconds=10)
    assert early == pytest.approx(late)
    assert 0 < late < on_time
    forgiving = RewardSettings(late_only=True)
    assert reward(**BENEFIT, seconds=10 * (1 - deviation), mean_seconds=10, settings=forgiving) == on_time
    assert reward(**BENEFIT, seconds=10 * (1 + deviation), mean_seconds=10, settings=forgiving) == pytest.approx(late)


@given(
    after=st.floats(0, 5),
    better=st.floats(0.01, 5),
    sooner=st.floats(0.01, 1),
    late_only=st.booleans(),
    seconds=st.floats(10, 100),
)
def test_a_lower_loss_and_less_lateness_never_hurt(
    after: float, better: float, sooner: float, late_only: bool, seconds: float
) -> None:
    settings = RewardSettings(late_only=late_only)

    def value(loss: float, time: float) -> float:
        return reward(2.0, loss, 0.2, 0.5, time, 10.0, settings)

    assert value(after - better, seconds) > value(after, seconds)
    assert value(after, 10 + (seconds - 10) * sooner) >= value(after, seconds)


def test_a_round_that_did_harm_is_not_excused_by_being_late() -> None:
    harm = {"loss_before": 1.0, "loss_after": 3.0, "ratio_step": 0.0, "importance_kept": 0.0, "mean_seconds": 10.0}
    assert reward(**harm, seconds=100.0) == reward(**harm, seconds=10.0) == pytest.approx(-20)


def test_rewards_without_a_mean_time_or_damping_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        reward(**BENEFIT, seconds=1, mean_seconds=0)
    with pytest.raises(ValueError, match="positive"):
        RewardSettings(damping=0)


def test_kept_importance_is_the_share_of_the_scores_that_is_left() -> None:
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.0])]
    kept = [torch.tensor([True, False, True]), torch.tensor([False, True])]
    assert kept_importance(scores, kept) == pytest.approx(4 / 10)
    assert kept_importance([torch.zeros(3)], [torch.tensor([True, False, False])]) == 1.0
