from __future__ import annotations

import math
from dataclasses import astuple, replace

import pytest
import torch
from control_cases import PACES
from hypothesis import given
from hypothesis import strategies as st

from spinecli.federation.split.control.estimates import Iteration, Pace, Paces, Transfer, observed_pace, paces_of

ANY_SECONDS = st.floats()
ANY_TRANSFER = st.builds(Transfer, st.integers(-5, 10**9), ANY_SECONDS)
ANY_ITERATION = st.builds(Iteration, st.integers(-1, 64), ANY_SECONDS, ANY_TRANSFER, ANY_TRANSFER)


def link(size: int, latency: float, rate: float) -> Transfer:
    return Transfer(size, latency + size * rate)


@given(
    rows=st.lists(st.integers(1, 64), min_size=1, max_size=20),
    row_bytes=st.tuples(st.integers(100, 100_000), st.integers(100, 100_000)),
    latency=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    rate=st.tuples(st.floats(1e-9, 1e-5), st.floats(1e-9, 1e-5)),
    compute=st.floats(0, 10),
)
def test_a_round_over_a_clean_link_tells_the_pace_that_predicts_every_iteration(
    rows: list[int],
    row_bytes: tuple[int, int],
    latency: tuple[float, float],
    rate: tuple[float, float],
    compute: float,
) -> None:
    up, down = row_bytes
    iterations = [
        Iteration(n, n * compute, link(n * up, latency[0], rate[0]), link(n * down, latency[1], rate[1])) for n in rows
    ]
    bottom = 10 * max(rows) * max(row_bytes)
    pace = observed_pace(iterations, [link(bottom, latency[0], rate[0])], [link(bottom, latency[1], rate[1])])
    assert pace is not None
    assert pace.compute_seconds == pytest.approx(compute)
    scale = sum(latency) + bottom * sum(rate)
    assert pace.transfer_seconds == pytest.approx(up * rate[0] + down * rate[1], rel=1e-3, abs=1e-4 * scale)
    assert pace.fixed_seconds == pytest.approx(sum(latency), rel=1e-3, abs=1e-4 * scale)
    for n, iteration in zip(rows, iterations, strict=True):
        wanted = iteration.compute_seconds + iteration.upload.seconds + iteration.download.seconds
        predicted = float(Paces.of([pace]).durations(torch.tensor([n]))[0])
        assert predicted == pytest.approx(wanted, rel=1e-3, abs=1e-4 * scale)


def test_messages_of_one_size_put_all_their_time_on_the_rate() -> None:
    iterations = [Iteration(4, 2.0, Transfer(400, 1.0), Transfer(800, 3.0))] * 5
    pace = observed_pace(iterations)
    assert pace is not None
    assert astuple(pace) == pytest.approx((0.5, 1.0, 0.0), abs=1e-9)


def test_a_slower_small_message_is_latency_and_never_a_negative_rate() -> None:
    iterations = [Iteration(1, 0.0, Transfer(100, 2.0), Transfer(0, 0.0))]
    pace = observed_pace(iterations, uploads=[Transfer(1000, 1.0)])
    assert pace is not None
    assert pace.transfer_seconds == pytest.approx(0.0, abs=1e-5)
    assert pace.fixed_seconds == pytest.approx(1.5, rel=1e-4)


@given(st.lists(ANY_ITERATION, max_size=6), st.lists(ANY_TRANSFER, max_size=3), st.lists(ANY_TRANSFER, max_size=3))
def test_no_report_however_absurd_becomes_a_pace_that_is_no_number(
    iterations: list[Iteration], uploads: list[Transfer], downloads: list[Transfer]
) -> None:
    pace = observed_pace(iterations, uploads, downloads)
    if pace is not None:
        assert all(0 <= figure < math.inf for figure in astuple(pace))
    if not any(iteration.plausible for iteration in iterations):
        assert pace is None


def test_an_iteration_that_is_no_number_is_passed_over() -> None:
    good = Iteration(2, 1.0, Transfer(10, 0.5), Transfer(10, 0.5))
    assert observed_pace([good, replace(good, compute_seconds=math.nan)]) == observed_pace([good])
    assert observed_pace([good, replace(good, upload=Transfer(10, -1.0))]) == observed_pace([good])
    assert observed_pace([good], uploads=[Transfer(10**6, math.inf)]) == observed_pace([good])


@pytest.mark.parametrize("figure", [-1.0, math.nan, math.inf])
def test_a_pace_is_finite_and_not_negative(figure: float) -> None:
    with pytest.raises(ValueError, match="negative or not finite"):
        Pace(0.1, figure, 0.1)


@given(PACES, PACES)
def test_the_average_keeps_four_fifths_and_stays_between_old_and_new(old: Pace, new: Pace) -> None:
    for before, seen, after in zip(astuple(old), astuple(new), astuple(old.updated(new)), strict=True):
        assert after == pytest.approx(0.8 * before + 0.2 * seen)
        assert min(before, seen) * (1 - 1e-12) <= after <= max(before, seen) * (1 + 1e-12)
    assert old.updated(new, retention=0.0) == new


def test_the_average_reaches_a_new_speed() -> None:
    estimate, fast = Pace(1.0, 1.0, 1.0), Pace(0.5, 0.25, 0.0)
    for _ in range(40):
        estimate = estimate.updated(fast)
    assert astuple(estimate) == pytest.approx(astuple(fast), abs=1e-3)


def test_an_unseen_device_counts_as_the_mean_of_its_class_or_of_all() -> None:
    known = {"a-0": Pace(1, 2, 3), "a-1": Pace(3, 4, 5), "b-0": Pace(8, 0, 1), "stranger": Pace(100, 100, 100)}
    devices = [("a-0", "a"), ("a-1", "a"), ("a-2", "a"), ("b-0", "b"), ("c-0", "c")]
    assert paces_of(known, devices) == [Pace(1, 2, 3), Pace(3, 4, 5), Pace(2, 3, 4), Pace(8, 0, 1), Pace(4, 2, 3)]
    assert paces_of({}, devices) is None
    assert paces_of({"stranger": Pace(1, 1, 1)}, devices) is None
    assert paces_of(known, []) is None
