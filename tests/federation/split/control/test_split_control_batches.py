from __future__ import annotations

import math

import pytest
import torch
from control_cases import PACES, SECONDS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.federation.split.control.batches import average_waiting, idle_share, regulated_batches, scaled_up
from spinecli.federation.split.control.estimates import Pace, Paces

FLEETS = st.lists(PACES, min_size=1, max_size=12)


def unlimited(paces: Paces) -> Tensor:
    return torch.full((len(paces.row_seconds),), 10**6)


@given(FLEETS, st.integers(1, 128))
def test_the_fastest_gets_the_largest_batch_and_all_others_take_as_long_up_to_one_row(
    fleet: list[Pace], largest: int
) -> None:
    paces = Paces.of(fleet)
    batches = regulated_batches(paces, largest, unlimited(paces))
    durations = paces.durations(batches)
    fastest = int(paces.durations(torch.full_like(batches, largest)).argmin())
    assert int(batches[fastest]) == largest
    assert int(batches.max()) == largest
    assert int(batches.min()) >= 1
    longest = float(durations[fastest])
    for index, (batch, seconds) in enumerate(zip(batches.tolist(), durations.tolist(), strict=True)):
        if batch > 1:
            assert seconds <= longest * (1 + 1e-6)
        assert seconds + float(paces.row_seconds[index]) >= longest * (1 - 1e-6)


@given(st.lists(SECONDS, min_size=1, max_size=12), st.floats(0, 5), st.integers(1, 128))
def test_with_equal_fixed_seconds_it_is_the_formula_of_the_paper(
    row_seconds: list[float], fixed: float, largest: int
) -> None:
    paces = Paces.of([Pace(seconds, 0.0, fixed) for seconds in row_seconds])
    quickest = min(row_seconds)
    wanted = [max(1, math.floor(largest * quickest / seconds + 1e-9)) for seconds in row_seconds]
    assert regulated_batches(paces, largest, unlimited(paces)).tolist() == wanted


def test_a_slow_link_start_is_not_paid_for_with_a_batch_that_takes_too_long() -> None:
    paces = Paces.of([Pace(0.01, 0.0, 0.0), Pace(0.01, 0.0, 0.32), Pace(0.02, 0.0, 0.0), Pace(0.01, 0.0, 9.0)])
    assert regulated_batches(paces, 64, unlimited(paces)).tolist() == [64, 32, 32, 1]


@given(FLEETS, st.data())
def test_nobody_gets_more_rows_than_its_limit_and_renaming_devices_renames_batches(
    fleet: list[Pace], data: st.DataObject
) -> None:
    paces = Paces.of(fleet)
    limits = torch.tensor(data.draw(st.lists(st.integers(1, 40), min_size=len(fleet), max_size=len(fleet))))
    order = torch.tensor(data.draw(st.permutations(range(len(fleet)))))
    batches = regulated_batches(paces, 64, limits)
    assert torch.equal(batches, regulated_batches(paces, 64, unlimited(paces)).minimum(limits))
    assert torch.equal(regulated_batches(paces.of_cohort(order), 64, limits[order]), batches[order])


def test_devices_that_take_no_time_get_the_largest_batch() -> None:
    paces = Paces.of([Pace(0.0, 0.0, 0.0), Pace(1.0, 0.0, 0.0), Pace(0.0, 0.0, 2.0)])
    assert regulated_batches(paces, 8, unlimited(paces)).tolist() == [8, 1, 8]
    assert idle_share(torch.zeros(3)) == 0.0


def test_impossible_limits_are_refused() -> None:
    paces = Paces.of([Pace(1.0, 0.0, 0.0)])
    with pytest.raises(ValueError, match="at least 1 row"):
        regulated_batches(paces, 0, unlimited(paces))
    with pytest.raises(ValueError, match="at least 1 row"):
        regulated_batches(paces, 8, torch.tensor([0]))


@given(FLEETS)
def test_nobody_is_idle_for_longer_than_a_row_of_its_own_takes(fleet: list[Pace]) -> None:
    paces = Paces.of([Pace(pace.compute_seconds, pace.transfer_seconds) for pace in fleet])
    # Slower than this, a device is too slow even for a single row.
    if float(paces.row_seconds.max() / paces.row_seconds.min()) <= 64:
        durations = paces.durations(regulated_batches(paces, 64, unlimited(paces)))
        assert idle_share(durations) <= float(paces.row_seconds.mean() / durations.max()) + 1e-6


def test_regulation_takes_most_of_the_waiting_away() -> None:
    paces = Paces.of([Pace(seconds, 0.0) for seconds in (0.1, 0.15, 0.3, 0.8)])
    equal, regulated = (
        paces.durations(torch.full((4,), 64)),
        paces.durations(regulated_batches(paces, 64, unlimited(paces))),
    )
    assert idle_share(equal) > 0.5
    assert idle_share(regulated) < 0.02


def test_waiting_is_counted_from_the_slowest() -> None:
    durations = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    assert average_waiting(durations) == pytest.approx(4 / 3)
    assert idle_share(durations) == pytest.approx(1 / 3)


@st.composite
def scalable(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, float]:
    count, largest = draw(st.integers(1, 10)), draw(st.integers(1, 64))
    limits = torch.tensor(draw(st.lists(st.integers(1, 100), min_size=count, max_size=count)))
    wanted = torch.tensor(draw(st.lists(st.integers(1, 64), min_size=count, max_size=count)))
    batches = wanted.minimum(limits).clamp(max=largest)
    return batches, limits, largest, float(batches.sum()) + draw(st.floats(0, 400) | st.just(math.inf))


@given(scalable())
def test_scaling_keeps_budget_limits_and_proportions_and_lowers_nobody(
    case: tuple[Tensor, Tensor, int, float],
) -> None:
    batches, limits, largest, budget = case
    scaled = scaled_up(batches, limits, largest, budget)
    assert int(scaled.sum()) <= budget
    assert bool((scaled <= limits.clamp(max=largest)).all())
    assert bool((scaled >= batches).all())
    free = scaled < limits
    if bool(free.any()):
        low, high = ((scaled[free] - 1) / batches[free]).max(), ((scaled[free] + 1) / batches[free]).min()
        assert float(low) <= float(high) + 1e-6
    assert torch.equal(scaled, scaled_up(batches, limits, largest, budget))


@given(scalable())
def test_scaling_goes_as_far_as_it_may(case: tuple[Tensor, Tensor, int, float]) -> None:
    batches, limits, largest, budget = case
    scaled = scaled_up(batches, limits, largest, budget)
    growing = batches < limits
    if bool(growing.any()) and not bool((scaled == largest)[growing].any()):
        everywhere = bool((scaled == limits)[growing].all())
        assert everywhere or int(scaled.sum()) > budget - len(batches)


def test_scaling_by_hand() -> None:
    batches, limits = torch.tensor([8, 4, 1]), torch.tensor([100, 100, 1])
    assert scaled_up(batches, limits, 64, math.inf).tolist() == [64, 32, 1]
    assert scaled_up(batches, limits, 64, 25.0).tolist() == [16, 8, 1]
    assert scaled_up(batches, limits, 64, 13.0).tolist() == [8, 4, 1]
    assert scaled_up(batches, limits, 64, math.inf, lambda found: int(found[0]) <= 20).tolist() == [19, 9, 1]
    assert scaled_up(batches, limits, 64, math.inf, lambda _: False).tolist() == [8, 4, 1]


@pytest.mark.parametrize(("batches", "budget"), [([9, 1], 100), ([4, 4], 7), ([0, 1], 100)])
def test_batches_beyond_their_bounds_are_not_scaled(batches: list[int], budget: float) -> None:
    with pytest.raises(ValueError, match="beyond the budget"):
        scaled_up(torch.tensor(batches), torch.tensor([50, 50]), 8, budget)
