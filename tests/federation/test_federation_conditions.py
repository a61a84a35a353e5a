from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.federation.simulation.conditions import Conditions, conditions
from spinecli.federation.simulation.fleet import DeviceClass, DeviceSpec, load_fleet

MANY = 4000


def device(name: str = "a-00", **changes: Any) -> DeviceSpec:
    values = {
        "name": "a",
        "count": 1,
        "modes": [1e9, 2e9, 4e9],
        "mode_rounds": 5,
        "up_mbps": [1, 30],
        "down_mbps": [10, 100],
        "memory_gb": 1,
        "jitter": 0.4,
        "dropout": 0.3,
        "latency_ms": 20,
    }
    return DeviceSpec(name, DeviceClass.model_validate(values | changes))


seeds, rounds = st.integers(0, 2**63), st.integers(0, 10**6)


@given(seeds, rounds, st.text(min_size=1, max_size=20))
def test_values_lie_where_the_fleet_says(seed: int, round_number: int, name: str) -> None:
    found = conditions(device(name), seed, round_number)
    assert found.flops_per_second in (1e9, 2e9, 4e9)
    assert 1e6 <= found.up_bits_per_second <= 30e6
    assert 10e6 <= found.down_bits_per_second <= 100e6
    assert found.latency_seconds == 0.02
    assert 0 < found.jitter < math.inf
    assert found.fails_at is None or 0 <= found.fails_at < 1


@given(seeds)
def test_neither_order_nor_other_devices_matter(seed: int) -> None:
    fleet = load_fleet("phones-12")
    asked = [(spec, round_number) for spec in fleet.devices for round_number in range(4)]
    first = {(spec.name, number): conditions(spec, seed, number) for spec, number in asked}
    random.Random(seed).shuffle(asked)
    assert {(spec.name, number): conditions(spec, seed, number) for spec, number in asked} == first
    grown = {spec.name: spec for spec in load_fleet("phones-50").devices}
    assert all(conditions(grown[name], seed, number) == value for (name, number), value in first.items())
    assert len({value.jitter for value in first.values()}) == len(first)


def test_the_same_on_every_machine() -> None:
    found = conditions(load_fleet("jetson-80").devices[3], seed=1, round_number=4)
    assert found.flops_per_second == 0.09e12
    assert found.up_bits_per_second == pytest.approx(24051921.915016927, rel=1e-12)
    assert found.jitter == pytest.approx(1.07415107160916, rel=1e-9)


@given(seeds, st.integers(1, 9), st.integers(0, 200))
def test_mode_and_links_hold_for_a_whole_period(seed: int, mode_rounds: int, period: int) -> None:
    subject = device(mode_rounds=mode_rounds)
    found = [conditions(subject, seed, period * mode_rounds + step) for step in range(mode_rounds)]
    assert len({(one.flops_per_second, one.up_bits_per_second, one.down_bits_per_second) for one in found}) == 1
    after = conditions(subject, seed, (period + 1) * mode_rounds)
    assert after.up_bits_per_second != found[-1].up_bits_per_second
    assert len({one.jitter for one in found}) == mode_rounds


def test_zero_mode_rounds_never_redraws() -> None:
    subject = device(mode_rounds=0)
    found = [conditions(subject, 3, number) for number in range(200)]
    assert len({(one.flops_per_second, one.up_bits_per_second) for one in found}) == 1


def test_every_mode_is_equally_likely_and_links_fill_their_interval() -> None:
    found = [conditions(device(mode_rounds=1), 5, number) for number in range(MANY)]
    for mode in (1e9, 2e9, 4e9):
        share = sum(one.flops_per_second == mode for one in found) / MANY
        assert share == pytest.approx(1 / 3, abs=0.03)
    assert statistics.fmean(one.up_bits_per_second for one in found) == pytest.approx(15.5e6, rel=0.03)
    # one link quality places both directions
    for one in found[:50]:
        assert (one.up_bits_per_second - 1e6) / 29e6 == pytest.approx((one.down_bits_per_second - 10e6) / 90e6)


@pytest.mark.parametrize("chance", [0.0, 0.05, 0.5])
def test_devices_fail_as_often_as_the_fleet_says(chance: float) -> None:
    found = [conditions(device(dropout=chance), 7, number).fails_at for number in range(MANY)]
    failures = [share for share in found if share is not None]
    assert len(failures) / MANY == pytest.approx(chance, abs=0.03)
    if chance:
        assert statistics.fmean(failures) == pytest.approx(0.5, abs=0.07)
    else:
        assert failures == []


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.8])
def test_jitter_is_log_normal_around_one(sigma: float) -> None:
    logs = [math.log(conditions(device(jitter=sigma), 11, number).jitter) for number in range(MANY)]
    assert statistics.median(logs) == pytest.approx(0, abs=0.06 * sigma)
    assert statistics.pstdev(logs) == pytest.approx(sigma, rel=0.05)


def test_what_is_drawn_for_one_thing_leaves_the_others() -> None:
    plain, changed = device(), device(dropout=0.0, jitter=0.0)
    for number in range(30):
        first, second = conditions(plain, 1, number), conditions(changed, 1, number)
        assert first.flops_per_second == second.flops_per_second
        assert first.up_bits_per_second == second.up_bits_per_second


def test_seeds_and_devices_differ() -> None:
    drawn = {conditions(device(name), seed, 0).jitter for name in ("a-00", "a-01", "a-0") for seed in (0, 1, 10)}
    assert len(drawn) == 9


def test_seconds() -> None:
    found = Conditions(2e9, 1e6, 4e6, 0.05, 1.5, None)
    assert found.compute_seconds(8e9) == 6
    assert found.upload_seconds(250_000) == pytest.approx(2.05)
    assert found.download_seconds(250_000) == pytest.approx(0.55)
    assert found.upload_seconds(0) == 0.05


def test_rounds_count_from_zero() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        conditions(device(), 0, -1)
