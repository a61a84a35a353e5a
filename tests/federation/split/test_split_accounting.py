"""What a split run says of bytes and seconds is what was exchanged and computed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from families import recipe
from small_splits import SplitMaker, Watched, planned

from spinecli.data.config import Task
from spinecli.federation.engine import Lost, Reply
from spinecli.federation.messages import Message
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.split import rounds
from spinecli.federation.split.device import SplitDevice, handle
from spinecli.federation.split.messages import STEP

every_strategy = pytest.mark.parametrize("strategy", ["mergesfl", "splitfed", "fedavg"])


def spoiled_step(kind: str, message: Message, device: SplitDevice) -> Message:
    found = handle(kind, message, device)
    return found if kind != STEP else Message({"iteration": 99}, found.tensors)


def refusing(watched: Watched) -> None:
    watched.misbehaving = {"fast-00": spoiled_step}


@every_strategy
def test_bytes_are_those_of_the_packed_messages(splits: SplitMaker, strategy: str) -> None:
    """Of devices that came to the end, that failed on the way, and that were refused."""
    watched = Watched(splits(strategy=strategy, cohort=5, fleet={"dropout": 0.3}, rounds=4))
    refusing(watched)
    for number in range(4):
        watched.exchanges.clear()
        (record,) = watched.go_on(number + 1)
        down, up = {}, {}
        for exchange in watched.exchanges:
            for job, outcome in exchange:
                down[job.device] = down.get(job.device, 0) + len(job.message.pack())
                if isinstance(outcome, Reply):
                    up[job.device] = up.get(job.device, 0) + len(outcome.message.pack())
        assert {each.device: each.bytes_down for each in record.devices} == down
        assert {each.device: each.bytes_up for each in record.devices if each.bytes_up} == up
        probed = record.split.probed_bytes if record.split else 0
        assert record.bytes == sum(down.values()) + sum(up.values()) + probed
    lost = {each.lost for record in watched.rounds for each in record.devices}
    assert lost >= ({None, "failed"} if strategy == "fedavg" else {None, "failed", "refused"})


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_round_of_tau_iterations_is_tau_and_one_exchanges(splits: SplitMaker, steps: int) -> None:
    watched = Watched(splits(local_steps=steps, rounds=2))
    first, _ = watched.go_on()
    assert len(watched.exchanges) == 2 * (steps + 1)
    for exchange in watched.exchanges[: steps + 1]:
        assert [job.device for job, _ in exchange] == [each.device for each in first.devices]
    kinds = [exchange[0][0].kind for exchange in watched.exchanges[: steps + 1]]
    assert kinds == ["split-begin", *["split-step"] * (steps - 1), "split-finish"]
    parts = [(job.part, job.parts) for exchange in watched.exchanges[: steps + 1] for job, _ in exchange[:1]]
    assert parts == [(part, steps + 1) for part in range(steps + 1)]
    assert first.split is not None
    assert len(first.split.iterations) == steps


@pytest.mark.parametrize("steps", [1, 4])
def test_every_message_has_its_latency(splits: SplitMaker, steps: int) -> None:
    request = splits(local_steps=steps, rounds=2, cohort=5)
    watched = Watched(request)
    specs = {spec.name: spec for spec in request.fleet.devices}
    with patch.object(rounds, "plan_round", lambda *_: planned(dict.fromkeys(specs, 3))):
        records = watched.go_on()
    seen = set()
    for record in records:
        for each in record.devices:
            now = conditions(specs[each.device], request.config.seed, record.round)
            latency = (steps + 1) * now.latency_seconds
            assert each.download_seconds == pytest.approx(latency + 8 * each.bytes_down / now.down_bits_per_second)
            assert each.upload_seconds == pytest.approx(latency + 8 * each.bytes_up / now.up_bits_per_second)
            seen.add(now.latency_seconds)
    assert len(seen) == 2
    assert max(seen) > 0


def test_the_servers_work_moves_the_clock(splits: SplitMaker) -> None:
    speeds, ends, works, losses = (1e8, 1e14), [], [], []
    for speed in speeds:
        watched = Watched(splits(fleet={"equal": True, "server_flops": speed}, strategy="splitfed", rounds=2))
        watched.go_on()
        ends.append(watched.rounds[-1].ended)
        works.append(watched.work)
        losses.append(watched.losses())
    assert works[0] == works[1]
    assert losses[0] == losses[1]
    assert len(works[0]) == 2 * 3
    assert ends[0] - ends[1] == pytest.approx(sum(works[0]) * (1 / speeds[0] - 1 / speeds[1]))
    assert ends[0] > 1.2 * ends[1]


def test_the_servers_work_is_that_of_the_merged_batch(splits: SplitMaker) -> None:
    watched = Watched(splits(local_steps=1, rounds=1))
    watched.go_on()
    lengths = [outcome.message.tensors["lengths"] for _, outcome in watched.exchanges[0] if isinstance(outcome, Reply)]
    rows, longest = sum(len(each) for each in lengths), max(int(each.max()) for each in lengths)
    assert watched.work == [watched.training.costs.top(rows, longest).flops]


@every_strategy
@pytest.mark.parametrize("task", ["classification", "language"])
def test_a_devices_seconds_add_up_to_the_round(splits: SplitMaker, strategy: str, task: Task) -> None:
    """Down, computing, up, and waiting; the rest is the server's own work, and its first look at the devices."""
    watched = Watched(splits(strategy=strategy, task=task, cohort=5, fleet={"dropout": 0.1}, rounds=3, local_steps=2))
    complete = 0
    for number in range(3):
        watched.work.clear()
        (record,) = watched.go_on(number + 1)
        server = sum(watched.work) / 1e12 + (watched.probe_seconds if number == 0 else 0)
        for each in record.devices:
            if each.lost is None:
                spent = each.download_seconds + each.compute_seconds + each.upload_seconds + each.waiting_seconds
                assert spent + server == pytest.approx(record.seconds, rel=1e-9)
                complete += 1
            assert min(each.download_seconds, each.compute_seconds, each.upload_seconds, each.waiting_seconds) >= 0
        assert 0 <= record.idle_share <= 1
    assert complete > 6


def test_rounds_follow_one_another_on_the_clock(splits: SplitMaker) -> None:
    watched = Watched(splits(rounds=3))
    records = watched.go_on()
    assert [record.began for record in records] == [0.0, *(record.ended for record in records[:-1])]
    for record in records:
        assert record.split is not None
        ends = [iteration.ended for iteration in record.split.iterations]
        assert record.began < ends[0]
        assert ends == sorted(ends)
        assert ends[-1] < record.ended


@pytest.mark.parametrize("task", ["classification", "language"])
def test_smaller_features_save_what_they_promise(splits: SplitMaker, task: Task) -> None:
    """Between types only the features' bytes differ, the same tokens given."""
    sizes: dict[str, list[int]] = {}
    tokens: list[int] = []
    cohort = {"slow-00": 6, "fast-00": 3}
    kinds: list[Any] = ["fp32", "bf16", "int8"]
    for dtype in kinds:
        watched = Watched(splits(task=task, feature_dtype=dtype, local_steps=2, rounds=1))
        with patch.object(rounds, "plan_round", lambda *_: planned(cohort)):
            watched.go_on()
        answers = [outcome for exchange in watched.exchanges[:2] for _, outcome in exchange]
        assert not any(isinstance(outcome, Lost) for outcome in answers)
        tokens = [int(outcome.message.tensors["lengths"].sum()) for outcome in answers if isinstance(outcome, Reply)]
        sizes[dtype] = [outcome.timing.bytes_up for outcome in answers if isinstance(outcome, Reply)]
    padding = 8 * 4  # safetensors and its header round up
    for plain, half, small, count in zip(*(sizes[dtype] for dtype in kinds), tokens, strict=True):
        assert abs(plain - half - count * 2 * 32) <= padding
        assert abs(plain - small - count * (3 * 32 - 4)) <= padding + 80  # one more tensor to name


def test_a_deeper_cut_loads_devices_and_spares_the_server(splits: SplitMaker) -> None:
    devices, server, features = [], [], []
    cohort = {"slow-00": 4, "fast-00": 4}
    for cut in (1, 2, 3):
        watched = Watched(splits(recipe("llama", grouped=True, blocks=4), cut_layer=cut, local_steps=1, rounds=1))
        with patch.object(rounds, "plan_round", lambda *_: planned(cohort)):
            (record,) = watched.go_on()
        devices.append(sum(each.compute_seconds for each in record.devices))
        server.append(sum(watched.work))
        features.append(
            [o.message.tensors["features.values"].nbytes for _, o in watched.exchanges[0] if isinstance(o, Reply)]
        )
    assert devices == sorted(devices)
    assert server == sorted(server, reverse=True)
    assert features[0] == features[1] == features[2]
