from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

import pytest
from small_federations import Watched, adapter_digest
from sums import digest

from spinecli.errors import FederationError
from spinecli.federation.loop import learning_rate
from spinecli.federation.results import summarised
from spinecli.federation.strategies import STRATEGIES


def test_a_round_is_told_as_it_was(requests: Any) -> None:
    watched = Watched(requests(strategy="fedspine"))
    records = watched.go_on(4)
    assert [record.round for record in records] == [0, 1, 2, 3]
    assert records[0].began == 0
    for before, after in pairwise(records):
        assert after.began == before.ended
    config = watched.request.config
    for record, assignments, updates in zip(records, watched.assignments, watched.updates, strict=True):
        assert record.learning_rate == learning_rate(config.learning_rate, "linear", record.round, 4)
        assert [device.device for device in record.devices] == list(assignments)
        for device, update in zip(record.devices, updates, strict=True):
            timing = update.timing
            assert device.device == update.device
            assert device.lost is None
            assert (device.loss_before, device.loss_after, device.ratio) == (
                update.loss_before,
                update.loss_after,
                update.ratio,
            )
            parts = device.download_seconds + device.compute_seconds + device.upload_seconds
            assert parts + device.waiting_seconds == pytest.approx(record.seconds)
            assert device.compute_seconds == pytest.approx(update.forward_seconds + update.backward_seconds)
            assert (device.bytes_down, device.bytes_up) == (timing.bytes_down, timing.bytes_up)
            assert device.depth == watched.federation.setting.blocks
            assert device.rank == assignments[device.device].ranks[0]
        assert min(device.waiting_seconds for device in record.devices) == pytest.approx(0)


def test_evaluation_is_done_when_it_is_due_and_at_the_end(requests: Any) -> None:
    records = Watched(requests(strategy="fedit", rounds=5)).go_on(5, evaluate_every=2)
    assert [record.evaluation is not None for record in records] == [False, True, False, True, True]


def test_a_run_stops_at_its_target_and_does_not_go_on(requests: Any) -> None:
    watched = Watched(requests(strategy="fedit", rounds=6))
    records = watched.go_on(6, target_accuracy=0.01)
    assert len(records) == 1
    assert watched.go_on(6, target_accuracy=0.01) == []
    found = summarised(records, 0.01)
    assert found.seconds_to_target == records[0].ended
    assert found.bytes_to_target == found.bytes == records[0].bytes
    assert summarised(records, 1.1).seconds_to_target is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_round_in_which_every_device_is_lost_changes_nothing_and_the_run_goes_on(
    requests: Any, strategy: str
) -> None:
    watched = Watched(requests(strategy=strategy, rounds=8))
    watched.go_on(2)
    model = watched.federation.strategy.model()
    before = adapter_digest(model.adapter), digest(dict(model.head))
    lost = watched.go_on(3, deadline=1e-6)[0]
    assert {device.lost for device in lost.devices} == {"late"}
    assert watched.updates[2] == []
    assert len(watched.lost[2]) == len(lost.devices)
    assert lost.seconds == pytest.approx(1e-6)
    model = watched.federation.strategy.model()
    assert (adapter_digest(model.adapter), digest(dict(model.head))) == before
    assert lost.evaluation == watched.history.rounds[1].evaluation
    last = watched.go_on(4)[0]
    assert {device.lost for device in last.devices} == {None}
    model = watched.federation.strategy.model()
    assert (adapter_digest(model.adapter), digest(dict(model.head))) != before


@pytest.mark.parametrize("strategy", ["fedit", "fedspine", "fedspine-model"])
def test_with_thirty_percent_of_the_devices_failing_a_run_finishes_learns_and_says_who(
    requests: Any, strategy: str
) -> None:
    request = requests(
        strategy=strategy,
        rounds=8,
        cohort=5,
        local_steps=8,
        sparsity=0.2,
        examples=300,
        fleet={"dropout": 0.3},
    )
    watched = Watched(request)
    records = watched.go_on(8)
    found = summarised(records, None)
    failed = [(record.round, device.device) for record in records for device in record.devices if device.lost]
    assert {device.lost for record in records for device in record.devices} == {None, "failed"}
    assert 4 <= len(failed) <= 20
    assert sum(reasons["failed"] for reasons in found.lost.values()) == len(failed)
    assert set(found.lost) == {device for _, device in failed}
    met = [[device.loss_before for device in record.devices if device.loss_before] for record in records]
    assert median(met[-1]) < 0.75 * median(met[0]), "the model that devices are sent gets better"
    assert found.best_accuracy is not None
    assert found.best_accuracy > 0.55


def test_nobody_who_can_take_part_ends_the_run_with_a_sentence(requests: Any) -> None:
    tiny = {"slow_gb": 1e-6, "fast_gb": 1e-6}
    with pytest.raises(FederationError, match=r"No device of the fleet can hold.*--batch-size"):
        Watched(requests(strategy="legend", fleet=tiny)).go_on(1)


def test_a_device_is_told_the_last_round_that_was_accepted(requests: Any) -> None:
    """Also by a loop that goes on from a history."""
    watched = Watched(requests(strategy="fedspine", rounds=4, cohort=5))
    told: list[dict[str, Any]] = []
    exchange = watched.federation.engine.exchange

    def listening(jobs: Any, deadline: Any) -> Any:
        told.append({job.device: job.message.header["acknowledged"] for job in jobs})
        return exchange(jobs, deadline)

    watched.federation.engine.exchange = listening  # type: ignore[method-assign]
    watched.go_on(1)
    watched.go_on(2, deadline=1e-6)
    watched.go_on(4)
    assert [set(each.values()) for each in told] == [{None}, {0}, {0}, {2}]


def test_the_loop_saves_after_every_round(requests: Any) -> None:
    watched = Watched(requests(strategy="fedit"))
    watched.go_on(3)
    assert [state.rounds for state in watched.states] == [1, 2, 3]
    assert [state.engine.values["clock"] for state in watched.states] == [r.ended for r in watched.history.rounds]


def test_options_reach_the_devices(requests: Any) -> None:
    request = requests(
        strategy="fedspine", local_steps=3, batch_size=2, clip_norm=0.5, score="salience", lora_scale=4.0
    )
    watched = Watched(request)
    orders: list[dict[str, Any]] = []
    exchange = watched.federation.engine.exchange

    def listening(jobs: Any, deadline: Any) -> Any:
        orders.extend(job.message.header for job in jobs)
        return exchange(jobs, deadline)

    watched.federation.engine.exchange = listening  # type: ignore[method-assign]
    watched.go_on(1)
    for order in orders:
        assert (order["steps"], order["batch_size"], order["clip_norm"], order["scale"]) == (3, 2, 0.5, 4.0)
        assert order["pruning"]["score"] == "salience"
        assert order["pruning"]["interval"] == request.config.pruning.prune_interval
        assert order["seed"] == request.config.seed
    assert len(orders) == 3
