from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from small_federations import Watched, fleet_text
from torch import Tensor

from spinecli.federation.client.device import Device, DeviceMemory
from spinecli.federation.engine import Job, Lost, Reply
from spinecli.federation.history import RunState, load_state
from spinecli.federation.messages import Message
from spinecli.federation.simulation.conditions import Conditions, conditions
from spinecli.federation.simulation.fleet import Fleet, load_fleet
from spinecli.federation.simulation.local_engine import LocalEngine, Simulated
from spinecli.federation.simulation.virtual_clock import VirtualMeter

SEED = 3
FLOPS = {"forward": 2e8, "backward": 5e8}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return fleet_of(tmp_path)


def fleet_of(folder: Path, **changes: Any) -> Fleet:
    path = folder / "fleet.toml"
    path.write_text(fleet_text(**changes))
    return load_fleet(str(path))


def bare(name: str, examples: int) -> Simulated[Device]:
    """A device without a model."""
    nothing, meter = cast("Any", None), VirtualMeter()
    device = Device(name, nothing, nothing, nothing, range(examples), DeviceMemory(), meter)
    return Simulated(device, meter, examples, (examples, 0))


def engine_of(fleet: Fleet) -> LocalEngine[Device]:
    """Devices whose work is `answer`: no model, but FLOPs and bytes."""
    devices = {spec.name: bare(spec.name, number + 1) for number, spec in enumerate(fleet.devices)}
    return LocalEngine(fleet, devices, answer, SEED)


def answer(kind: str, message: Message, device: Device) -> Message:
    for phase, flops in FLOPS.items():
        device.meter.charge(phase, flops)
    device.memory.tensors["count"] = device.memory.tensors.get("count", torch.tensor(0)) + 1
    return Message({"kind": kind, "from": device.name}, {"value": torch.ones(len(device.indices), 100)})


def job(device: str, number: int = 0, size: int = 50) -> Job:
    return Job(device, "train", number, Message({"to": device}, {"sent": torch.zeros(size)}))


def names(fleet: Fleet) -> list[str]:
    return [spec.name for spec in fleet.devices]


def current(fleet: Fleet, device: str, number: int = 0) -> Conditions:
    return conditions(next(spec for spec in fleet.devices if spec.name == device), SEED, number)


def test_devices_enrol_with_what_they_are(fleet: Fleet) -> None:
    nodes = engine_of(fleet).nodes()
    assert [node.name for node in nodes] == ["slow-00", "slow-01", "slow-02", "fast-00", "fast-01"]
    assert [node.examples for node in nodes] == [1, 2, 3, 4, 5]
    assert {(node.device_class, node.memory_bytes) for node in nodes} == {("slow", 10**9), ("fast", 4 * 10**9)}


def test_a_round_is_download_compute_and_upload(fleet: Fleet) -> None:
    engine = engine_of(fleet)
    for number in range(3):
        start = engine.now()
        jobs = [job(device, number, 10 * place + 10) for place, device in enumerate(names(fleet))]
        outcomes = engine.exchange(jobs, None)
        ends = []
        for asked, outcome in zip(jobs, outcomes, strict=True):
            assert isinstance(outcome, Reply)
            assert outcome.device == asked.device
            now, timing = current(fleet, asked.device, number), outcome.timing
            assert timing.bytes_down == len(asked.message.pack())
            assert timing.bytes_up == len(outcome.message.pack())
            down = now.download_seconds(timing.bytes_down)
            compute = now.compute_seconds(FLOPS["forward"]) + now.compute_seconds(FLOPS["backward"])
            up = now.upload_seconds(timing.bytes_up)
            assert timing.sent == start
            assert timing.started == start + down
            assert timing.finished == start + down + compute
            assert timing.arrived == start + down + compute + up
            assert timing.download_seconds == pytest.approx(down)
            assert timing.compute_seconds == pytest.approx(compute)
            assert timing.upload_seconds == pytest.approx(up)
            assert timing.seconds == pytest.approx(down + compute + up)
            ends.append(timing.arrived)
        assert engine.now() == pytest.approx(max(ends))


def test_nobody_asked_takes_no_time(fleet: Fleet) -> None:
    engine = engine_of(fleet)
    assert engine.exchange([], 5.0) == []
    assert engine.now() == 0


def test_who_is_late_is_given_up_at_the_deadline(fleet: Fleet) -> None:
    jobs = [job(device) for device in names(fleet)]
    free = engine_of(fleet).exchange(jobs, None)
    seconds = [outcome.timing.seconds for outcome in free if isinstance(outcome, Reply)]
    deadline = sorted(seconds)[2]
    engine = engine_of(fleet)
    outcomes = engine.exchange(jobs, deadline)
    assert engine.now() == deadline
    for took, outcome in zip(seconds, outcomes, strict=True):
        if took <= deadline:
            assert isinstance(outcome, Reply)
        else:
            assert isinstance(outcome, Lost)
            assert (outcome.reason, outcome.seconds) == ("late", deadline)
            assert f"{took:.3g} s" in outcome.explanation
            assert outcome.bytes_down > 0
    assert sum(isinstance(outcome, Lost) for outcome in outcomes) == 2


def test_a_deadline_that_nobody_needs_does_not_make_the_round_longer(fleet: Fleet) -> None:
    free, patient = engine_of(fleet), engine_of(fleet)
    jobs = [job(device) for device in names(fleet)]
    free.exchange(jobs, None)
    patient.exchange(jobs, 1e9)
    assert free.now() == patient.now() < 1e9


def test_a_device_fails_within_the_time_that_its_last_round_took(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, dropout=0.5)
    engine = engine_of(fleet)
    usual: dict[str, float] = {}
    failed = answered = 0
    for number in range(8):
        start = engine.now()
        outcomes = engine.exchange([job(device, number) for device in names(fleet)], None)
        for asked, outcome in zip(names(fleet), outcomes, strict=True):
            now = current(fleet, asked, number)
            if now.fails_at is None:
                assert isinstance(outcome, Reply)
                usual[asked] = outcome.timing.compute_seconds
                answered += 1
            else:
                assert isinstance(outcome, Lost)
                assert outcome.reason == "failed"
                down = now.download_seconds(outcome.bytes_down)
                assert outcome.seconds == pytest.approx(down + now.fails_at * usual.get(asked, 0.0))
                failed += 1
        assert engine.now() > start
    assert failed > 8
    assert answered > 8


def test_a_device_that_fails_after_the_deadline_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, dropout=0.9)
    engine = engine_of(fleet)
    outcomes = engine.exchange([job(device) for device in names(fleet)], 1e-9)
    assert engine.now() == 1e-9
    assert all(isinstance(outcome, Lost) and outcome.seconds == 1e-9 for outcome in outcomes)
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Lost)} <= {"failed", "late"}


def told(outcomes: Sequence[Reply | Lost]) -> dict[str, Any]:
    return {each.device: (each.message.pack(), each.timing) if isinstance(each, Reply) else each for each in outcomes}


def test_the_order_of_jobs_and_who_else_is_asked_change_nothing(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, dropout=0.3)
    jobs = [job(device, 1) for device in names(fleet)]
    whole = told(engine_of(fleet).exchange(jobs, None))
    assert told(engine_of(fleet).exchange(jobs[::-1], None)) == whole
    for asked in jobs:
        alone = told(engine_of(fleet).exchange([asked], None))
        assert alone == {asked.device: whole[asked.device]}


def test_a_restored_engine_goes_on_as_the_other_would_have(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, dropout=0.4)
    engine, other = engine_of(fleet), engine_of(fleet)
    for number in range(3):
        engine.exchange([job(device, number) for device in names(fleet)], 3.0)
    nothing = RunState(3, engine.snapshot(), engine.snapshot())
    nothing.save(tmp_path)
    state = load_state(tmp_path)
    assert state is not None
    assert state.rounds == 3
    other.restore(state.engine)
    assert other.now() == engine.now()
    for number in range(3, 6):
        jobs = [job(device, number) for device in names(fleet)]
        assert told(engine.exchange(jobs, 3.0)) == told(other.exchange(jobs, 3.0))
        assert engine.now() == other.now()
    counts = [{name: int(value) for name, value in each.snapshot().tensors.items()} for each in (engine, other)]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 5


def test_the_snapshot_of_another_engine_is_refused(fleet: Fleet) -> None:
    engine = engine_of(fleet)
    snapshot = engine.snapshot()
    snapshot.values["clock"] = "late"
    with pytest.raises(TypeError, match="another engine"):
        engine.restore(snapshot)


def test_work_outside_of_a_job_is_refused() -> None:
    with pytest.raises(RuntimeError, match="outside of a job"):
        VirtualMeter().charge("forward", 1.0)


@pytest.mark.parametrize("order", [1, -1])
def test_real_devices_come_to_the_same_in_any_order(requests: Any, order: int) -> None:
    watched = Watched(requests(strategy="fedspine", cohort=3))
    engine, strategy = watched.federation.engine, watched.federation.strategy
    cohort = [node.name for node in watched.federation.setting.nodes][:3]
    loop_jobs = []
    kept: list[Any] = []
    original = engine.exchange

    def exchange(jobs: Sequence[Job], deadline: float | None) -> list[Reply | Lost]:
        loop_jobs.extend(jobs)
        kept.extend(original(list(jobs)[::order], deadline)[::order])
        return kept

    engine.exchange = exchange  # type: ignore[method-assign]
    watched.go_on(1)
    assert len(kept) == len(cohort)
    assert strategy is watched.federation.strategy
    found = told(kept)
    plain = Watched(requests(strategy="fedspine", cohort=3))
    assert told(plain.federation.engine.exchange(loop_jobs, None)) == found


def tensors_of(memory: DeviceMemory) -> dict[str, Tensor]:
    return dict(memory.tensors)


def test_a_late_cut_is_undone_and_the_next_round_fits(requests: Any) -> None:
    """A pruning device is late, takes part again, and both sides agree on where it stands."""
    watched = Watched(requests(strategy="fed-loraprune", cohort=5, rounds=6))
    engine, strategy, cuts = (
        watched.federation.engine,
        watched.federation.strategy,
        watched.federation.setting.cuts,
    )
    first = watched.go_on(2)[1]
    stood = {device.device: device.ratio for device in first.devices}
    assert all(ratio > 0 for ratio in stood.values())
    late = watched.go_on(3, deadline=1e-6)[0]
    assert {device.lost for device in late.devices} == {"late"}
    assert {device.device: device.ratio for device in late.devices} == stood, "a lost device stands where it stood"
    for name, ratio in stood.items():
        masks = strategy.masks_of(name)
        assert masks is not None
        assert cuts.ratio_of(cuts.widths_of(masks)) == ratio
        memory = engine._devices[name].work.memory
        assert int(memory.tensors["pending_round"]) == 2, "it has worked, and does not know that it was late"
    last = watched.go_on(6)
    for record in last:
        assert {device.lost for device in record.devices} == {None}
        for device in record.devices:
            assert device.ratio >= stood[device.device]
            stood[device.device] = device.ratio
            memory = DeviceMemory(tensors_of(engine._devices[device.device].work.memory))
            memory.settle(record.round)
            own = memory.masks(watched.federation.setting.shapes)
            server = strategy.masks_of(device.device)
            assert server is not None
            for here, there in zip(own.blocks, server.blocks, strict=True):
                assert torch.equal(here.heads, there.heads)
                assert torch.equal(here.channels, there.channels)
    assert len(last) == 3
    assert min(stood.values()) > 0.35
