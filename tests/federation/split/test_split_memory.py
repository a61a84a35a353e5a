"""What a device's memory holds is a limit for split training, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_splits import SplitMaker, Watched, plain_rows

from spinecli.artifacts.directory import OutputOptions
from spinecli.config import make_config
from spinecli.errors import FederationError, OptionError
from spinecli.federation.config import FederateConfig
from spinecli.federation.launch import launch
from spinecli.federation.simulation.fleet import Fleet
from spinecli.federation.split.request import SplitRequest, split_request

REGULATED, EQUAL = ["mergesfl", "sfl-br"], ["sfl-fm", "splitfed", "fedavg"]


def limited(request: SplitRequest, memory_bytes: int, device_class: str = "slow") -> SplitRequest:
    """The same request on a fleet of which one class has so little memory."""
    fleet = request.fleet
    classes = tuple(
        each.model_copy(update={"memory_gb": memory_bytes / 1e9}) if each.name == device_class else each
        for each in fleet.classes
    )
    return replace(request, fleet=Fleet(fleet.name, classes, fleet.reference))


def bytes_of(request: SplitRequest, rows: int) -> int:
    return request.costs().device_memory(rows, request.longest) + 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("strategy", REGULATED)
def test_batches_stay_within_memory_where_they_follow_the_devices(splits: SplitMaker, strategy: str, rows: int) -> None:
    """Also in the first look, before anything is known of the devices."""
    request = splits(strategy=strategy, cohort=5, rounds=3)
    request = limited(request, bytes_of(request, rows))
    assert request.costs().rows_held(request.longest, bytes_of(request, rows)) == rows
    watched = Watched(request)
    records = watched.go_on()
    batches = {device.device: device.batch for record in records for device in record.devices}
    assert {device.partition("-")[0] for device in batches} == {"slow", "fast"}
    assert max(batch for device, batch in batches.items() if device.startswith("slow")) <= rows
    probed = {job.device: job.message.header["rows"] for exchange in watched.probes for job, _ in exchange}
    assert {probed[device] for device in probed if device.startswith("slow")} == {min(4, rows)}
    assert {probed[device] for device in probed if device.startswith("fast")} == {4}
    slow, fast = request.needs()
    assert slow.most_bytes <= slow.limit_bytes
    assert slow.work.endswith(f"{rows} row{'s' if rows > 1 else ''}")
    assert fast.fits


@pytest.mark.parametrize("strategy", [*REGULATED, *EQUAL])
def test_a_class_that_cannot_hold_the_least_is_refused_before_anything_is_written(
    splits: SplitMaker, strategy: str, tmp_path: Path
) -> None:
    request = splits(strategy=strategy)
    least = 1 if strategy in REGULATED else 4
    request = limited(request, bytes_of(request, least) - 2)
    told = rf"cannot hold {strategy}: devices of class slow have .* GB and need at least .* GB .*{least} row"
    with pytest.raises(OptionError, match=told) as raised:
        launch(request, OutputOptions(tmp_path / "out"))
    assert ("--batch-size" in str(raised.value)) == (strategy in EQUAL)
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(FederationError, match=told):
        Watched(request)
    enough = limited(request, bytes_of(request, least))
    enough.require_memory()


def test_a_batch_is_no_larger_than_the_examples_of_a_device(splits: SplitMaker) -> None:
    request = splits(strategy="splitfed", batch_size=40)
    parts, devices = request.parts, request.fleet.devices
    most = {
        kind: max(len(part) for part, spec in zip(parts, devices, strict=True) if spec.device_class.name == kind)
        for kind in ("slow", "fast")
    }
    assert max(most.values()) < 40
    assert [need.work.rpartition(", ")[2] for need in request.needs()] == [f"{rows} rows" for rows in most.values()]


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed"])
def test_where_no_cut_holds_whole_batches_it_is_the_shallowest(splits: SplitMaker, strategy: str) -> None:
    """With as many rows as fit if the strategy gives everybody its own, else with none."""
    whole = splits(strategy=strategy, cut_layer=1)
    tight = limited(whole, bytes_of(whole, 2))
    config = make_config(FederateConfig, whole.config, {"cut_layer": "auto"})
    found = split_request(replace(tight, config=config))
    assert found.cut == 1
    if strategy == "mergesfl":
        found.require_memory()
    else:
        with pytest.raises(OptionError, match=r"1 of \d blocks, 4 rows"):
            found.require_memory()


@pytest.mark.parametrize("task", ["classification", "language"])
def test_a_device_with_the_whole_model_holds_its_head_and_logits(splits: SplitMaker, task: Any) -> None:
    request = splits(strategy="fedavg", task=task, rows=plain_rows(60) if task == "language" else None)
    costs, length = request.costs(), request.longest
    states = 4 if task == "classification" or request.config.split.top == "full" else 1
    assert costs.device_memory(0, length) == costs.bottom_memory(0, length) + 4 * states * request.head.parameters
    tokens = 3 * length
    logits = (tokens if request.head.per_token else 3) * request.head.weights // request.checkpoint.d_model
    assert costs.device_memory(3, length) - costs.bottom_memory(3, length) > 4 * logits
