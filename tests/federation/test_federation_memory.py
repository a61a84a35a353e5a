"""What a device's memory holds is a limit for every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_federations import Watched

from spinecli.artifacts.directory import OutputOptions
from spinecli.errors import FederationError, OptionError
from spinecli.federation.launch import launch
from spinecli.federation.memory import DeviceGroup, MemoryNeed, objection, places_of
from spinecli.federation.strategies import STRATEGIES
from spinecli.federation.strategies.fedit import FedIT

ADAPTING = ["hetlora", "flexlora", "flora", "legend", "fedspine", "fedspine-model"]
FIXED = ["fedit", "ffa-lora", "fed-loraprune"]
TOO_LITTLE = 1e-7
"""Gigabytes that hold nothing."""


def gigabytes(requests: Any, rank: int) -> float:
    """That hold training at a rank in all blocks, and at none above."""
    memory = Watched(requests(strategy="fedit")).federation.setting.memory
    blocks = len(memory.shapes)
    return (memory.needed([rank] * blocks) + memory.needed([rank + 1] * blocks)) / 2e9


def test_every_strategy_adapts_or_refuses() -> None:
    assert {*ADAPTING, *FIXED} == set(STRATEGIES)
    leaving_out = {name for name, strategy in STRATEGIES.items() if getattr(strategy, "leaves_out", None)}
    assert leaving_out == set(ADAPTING)


@pytest.mark.parametrize("strategy", ADAPTING)
def test_what_is_ordered_stays_within_each_devices_memory(requests: Any, strategy: str) -> None:
    """Between the smallest rank and the largest: the dense model is trained before anything is cut."""
    fleet = {"slow_gb": gigabytes(requests, 3), "fast_gb": gigabytes(requests, 5)}
    watched = Watched(requests(strategy=strategy, cohort=5, rounds=6, fleet=fleet))
    records = watched.go_on(6)
    setting = watched.federation.setting
    limits = {node.name: node.memory_bytes for node in setting.nodes}
    ordered = [(device, each.ranks) for found in watched.assignments for device, each in found.items()]
    assert {device for device, _ in ordered} == set(limits)
    assert all(setting.memory.needed(ranks) <= limits[device] for device, ranks in ordered)
    assert all(record.accepted for record in records)
    if strategy == "legend":
        return
    most = {kind: max(max(ranks) for device, ranks in ordered if kind in device) for kind in ("slow", "fast")}
    assert most["slow"] <= 3
    assert most["fast"] <= 5


@pytest.mark.parametrize("strategy", ADAPTING)
def test_a_class_that_cannot_hold_the_least_sits_out_and_is_named(
    requests: Any, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(requests(strategy=strategy, cohort=5, fleet={"slow_gb": TOO_LITTLE}))
    for record in watched.go_on(4):
        assert {device.device for device in record.devices} == {"fast-00", "fast-01"}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("devices of class slow have 1e-07 GB and need at least 0.0")
    assert told[0].endswith(f"under {strategy}, and so sit out")


@pytest.mark.parametrize("strategy", ADAPTING)
def test_a_cohort_that_sits_out_makes_an_empty_round(requests: Any, strategy: str) -> None:
    watched = Watched(requests(strategy=strategy, cohort=1, rounds=8, fleet={"slow_gb": TOO_LITTLE}))
    records = watched.go_on(8, evaluate_every=8)
    assert {len(record.devices) for record in records} == {0, 1}
    assert [record.accepted for record in records] == [bool(record.devices) for record in records]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fleet_that_cannot_hold_the_least_is_refused_before_anything_is_written(
    requests: Any, tmp_path: Path, strategy: str
) -> None:
    tiny = {"slow_gb": TOO_LITTLE, "fast_gb": TOO_LITTLE}
    request = requests(strategy=strategy, fleet=tiny)
    words = (
        rf"cannot? hold|can hold {strategy}: devices of class slow have 1e-07 GB and need at least .* GB .*--batch-size"
    )
    with pytest.raises(OptionError, match=words) as raised:
        launch(request, OutputOptions(tmp_path / "out"))
    assert raised.value.exit_code == 2
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(FederationError, match="--max-length"):
        Watched(request)


@pytest.mark.parametrize("strategy", FIXED)
def test_a_strategy_that_asks_the_same_of_all_refuses_a_class_that_cannot(requests: Any, strategy: str) -> None:
    request = requests(strategy=strategy, fleet={"slow_gb": gigabytes(requests, 3)})
    needs = request.needs()
    assert [(need.device_class, need.devices, need.fits) for need in needs] == [("slow", 3, False), ("fast", 2, True)]
    told = request.memory_objection(needs)
    assert told is not None
    assert "class slow" in told
    assert "rank 4 in all" in told
    assert "lower --batch-size, --max-length or --rank, take legend" in told


def test_the_table_tells_least_and_most_of_each_class(requests: Any) -> None:
    request = requests(strategy="fedspine", fleet={"slow_gb": gigabytes(requests, 3), "fast_gb": TOO_LITTLE})
    memory = Watched(requests(strategy="fedit")).federation.setting.memory
    blocks = len(memory.shapes)
    slow, fast = request.needs()
    assert slow.least_bytes == slow.most_bytes == memory.needed([2] * blocks)  # of 2, 4 and 6
    assert slow.work == f"rank 2 in all {blocks} blocks"
    assert slow.fits
    assert fast.least_bytes == memory.needed([2] * blocks)
    assert not fast.fits
    assert request.memory_objection([slow, fast]) is None
    (deep, _) = requests(strategy="legend").needs()
    assert deep.least_bytes < deep.most_bytes
    assert deep.work.startswith("ranks ")
    assert deep.work.endswith(f" in all {blocks} blocks")


def test_an_order_beyond_a_devices_memory_never_leaves_the_server(
    requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever strategy gives it."""
    monkeypatch.setattr(FedIT, "menu", classmethod(lambda cls, tuning, blocks, *_: [[1] * blocks]))
    watched = Watched(requests(strategy="fedit", fleet={"slow_gb": gigabytes(requests, 2)}, cohort=5))
    with pytest.raises(FederationError, match=r"slow-00 has .* GB and would need .* GB.*--batch-size"):
        watched.go_on(1)


def test_devices_that_are_alike_are_put_together() -> None:
    found = places_of([("a", 5, 1), ("b", 5, 2), ("a", 5, 7), ("a", 6, 3)])
    assert found == [DeviceGroup("a", 5, 2, 7), DeviceGroup("b", 5, 1, 2), DeviceGroup("a", 6, 1, 3)]


def test_one_that_fits_is_enough_only_where_others_may_sit_out() -> None:
    needs = [MemoryNeed("a", 1, 10, 5, 8, "rank 8"), MemoryNeed("b", 1, 4, 5, 5, "rank 4")]
    assert objection(needs, "x", "lower it", leaves_out=True) is None
    assert objection(needs[:1], "x", "lower it", leaves_out=False) is None
    told = objection(needs, "x", "lower it", leaves_out=False)
    assert told == (
        "The fleet cannot hold x: devices of class b have 4e-09 GB and need at least 5e-09 GB (rank 4); lower it."
    )
