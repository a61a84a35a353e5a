from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_splits import SplitMaker, Watched, planned

from spinecli.federation.engine import Reply, Timing
from spinecli.federation.simulation.conditions import Conditions, conditions
from spinecli.federation.split import rounds
from spinecli.federation.split.channel import ClientExchange
from spinecli.federation.split.rounds import look_at, pace_of

WORDS = ("bat", "dit", "kot", "lut")
EQUAL_ROWS = [
    {"text": " ".join((WORDS[n % 4], WORDS[n % 3], WORDS[n % 2], "bat")), "label": ("calm", "loud")[n % 2]}
    for n in range(60)
]
"""Rows of one length, so that every batch takes the same."""
COHORT = {"slow-00": 3, "slow-01": 5, "fast-00": 4, "fast-01": 1}


def conditions_of(watched: Watched, device: str) -> Conditions:
    """What holds for a device in the first round."""
    request = watched.request
    (spec,) = [each for each in request.fleet.devices if each.name == device]
    return conditions(spec, request.config.seed, 0)


def row_compute_seconds(watched: Watched, device: str) -> float:
    (length,) = set(watched.request.train.lengths.tolist())
    return conditions_of(watched, device).compute_seconds(watched.training.costs.bottom(1, length).flops)


def timings_of(watched: Watched, device: str) -> list[Timing]:
    """Of all exchanges of a run of one round."""
    found = [outcome for exchange in watched.exchanges for job, outcome in exchange if job.device == device]
    return [outcome.timing for outcome in found if isinstance(outcome, Reply)]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_round_shows_speed_rate_and_latency_of_every_device(splits: SplitMaker, steps: int) -> None:
    request = splits(rows=EQUAL_ROWS, local_steps=steps, rounds=2, fleet={"jitter": 0.0}, strategy="splitfed")
    watched = Watched(request)
    with patch.object(rounds, "plan_round", lambda *_: planned(COHORT)):
        watched.go_on(1)
    assert watched.training.state.paces.keys() == COHORT.keys()
    for device, rows in COHORT.items():
        found, now, timings = (
            watched.training.state.paces[device],
            conditions_of(watched, device),
            timings_of(watched, device),
        )
        features, gradients = timings[0].bytes_up, timings[steps].bytes_down
        transfer = 8 * features / now.up_bits_per_second + 8 * gradients / now.down_bits_per_second
        assert found.compute_seconds == pytest.approx(row_compute_seconds(watched, device), rel=0.01)
        assert found.transfer_seconds == pytest.approx(transfer / rows, rel=0.01)
        assert found.fixed_seconds == pytest.approx(2 * now.latency_seconds, rel=0.01, abs=1e-5)
        for timing in timings[1:steps]:
            assert rows * found.row_seconds + found.fixed_seconds == pytest.approx(timing.seconds, rel=0.01)


@given(
    steps=st.integers(1, 5),
    rows=st.integers(1, 64),
    compute=st.floats(1e-4, 1.0),
    rate_up=st.floats(1e-8, 1e-4),
    rate_down=st.floats(1e-8, 1e-4),
    latency=st.floats(0, 1.0),
)
def test_exact_links_are_recovered(
    steps: int, rows: int, compute: float, rate_up: float, rate_down: float, latency: float
) -> None:
    """Features of 4,000 bytes a row, and a bottom of another size at both ends of the round."""
    features, bottom = 4000 * rows, 300_001
    talk, clock = ClientExchange(rows), 0.0
    for part in range(steps + 1):
        down = bottom if part == 0 else features
        up = bottom if part == steps else features
        work = compute * rows * (0.4 if part == 0 else 0.6 if part == steps else 1.0)
        started = clock + latency + down * rate_down
        finished = started + work
        arrived = finished + latency + up * rate_up
        talk.timings.append(Timing(clock, started, finished, arrived, down, up))
        talk.ended.append(arrived)
        talk.trained.append(part > 0)
        clock = arrived
    found = pace_of(talk, steps)
    assert found is not None
    assert found.compute_seconds == pytest.approx(compute, rel=0.01)
    assert found.transfer_seconds == pytest.approx(4000 * (rate_up + rate_down), rel=0.01, abs=1e-5)
    assert found.fixed_seconds == pytest.approx(2 * latency, rel=0.01, abs=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_device_that_was_lost_early_tells_nothing(steps: int) -> None:
    talk = ClientExchange(4)
    assert pace_of(talk, steps) is None
    talk.timings.append(Timing(0.0, 1.0, 2.0, 3.0, 100, 100))
    talk.ended.append(3.0)
    talk.trained.append(False)
    assert pace_of(talk, steps) is None


def test_an_iteration_without_gradients_tells_nothing() -> None:
    """Who only went forward would look faster than it is."""
    talk, timings = ClientExchange(2), [(False, 1.0), (False, 1.0), (True, 3.0), (True, 2.0)]
    for number, (trained, work) in enumerate(timings):
        talk.timings.append(
            Timing(number * 9.0, number * 9.0 + 1, number * 9.0 + 1 + work, number * 9.0 + 2 + work, 100, 100)
        )
        talk.ended.append(number * 9.0 + 2 + work)
        talk.trained.append(trained)
    found = pace_of(talk, 3)
    assert found is not None
    assert found.compute_seconds == 1.5


@pytest.mark.parametrize("strategy", ["mergesfl", "sfl-br"])
def test_the_first_look_shows_every_devices_pace(splits: SplitMaker, strategy: str) -> None:
    watched = Watched(splits(rows=EQUAL_ROWS, fleet={"jitter": 0.0}, strategy=strategy))
    before = {name: value.clone() for name, value in watched.trained.items()}
    row_bytes = watched.request.row_bytes
    names = [node.name for node in watched.engine.nodes()]
    look = look_at(watched.engine, dict.fromkeys(names, 64), row_bytes, None)
    assert list(look.paces) == names
    for device, found in look.paces.items():
        now = conditions_of(watched, device)
        transfer = 8 * row_bytes / now.up_bits_per_second + 8 * row_bytes / now.down_bits_per_second
        assert found is not None
        assert found.compute_seconds == pytest.approx(row_compute_seconds(watched, device), rel=0.01)
        assert found.transfer_seconds == pytest.approx(transfer, rel=0.15)  # headers of small messages
        assert found.fixed_seconds == pytest.approx(2 * now.latency_seconds, rel=0.1, abs=2e-3)
    assert look.bytes == sum(
        len(job.message.pack()) + outcome.timing.bytes_up for exchange in watched.probes for job, outcome in exchange
    )
    assert all((watched.trained[name] == value).all() for name, value in before.items())


def test_only_strategies_that_follow_paces_look_first(splits: SplitMaker) -> None:
    for strategy, looks in (("sfl-br", 2), ("sfl-fm", 0), ("fedavg", 0)):
        watched = Watched(splits(strategy=strategy, rounds=2, local_steps=1))
        first, second = watched.go_on()
        assert len(watched.probes) == looks
        assert first.split is not None
        assert second.split is not None
        assert (first.split.probed_bytes > 0) == (looks > 0)
        assert second.split.probed_bytes == 0


def test_who_fails_while_it_is_looked_at_is_not_known(splits: SplitMaker) -> None:
    watched = Watched(splits(fleet={"dropout": 0.6}, seed=2))
    names = [node.name for node in watched.engine.nodes()]
    look = look_at(watched.engine, dict.fromkeys(names, 64), watched.request.row_bytes, None)
    assert 0 < len(look.paces) < len(names)
    watched.go_on()
    assert len(watched.rounds) == 3
