from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from families import Recipe, recipe

pytest.importorskip("nvflare")

from launched import THREE, Launcher, eventually
from small_federations import Maker
from sums import learned

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.source import describe_source
from spinecli.errors import FederationError, OptionError
from spinecli.federation.engine import Connect
from spinecli.federation.launch import launch
from spinecli.federation.request import FederatedRequest
from spinecli.federation.split.request import split_request
from spinecli.remote.client_dir import require_few
from spinecli.remote.launch import on_this_machine

pytestmark = pytest.mark.slow

SOON = 300.0


def here(request: FederatedRequest, notes: list[str]) -> Connect:
    return lambda state: on_this_machine(request, state, notes.append)


@pytest.mark.parametrize("strategy", ["fedit", "legend", "fedspine", "fedspine-model"])
def test_processes_end_with_the_bytes_of_the_simulation(requests: Maker, tmp_path: Path, strategy: str) -> None:
    request = requests(strategy=strategy, fleet=THREE, rounds=3)
    launch(request, OutputOptions(tmp_path / "local"))
    notes: list[str] = []
    launch(request, OutputOptions(tmp_path / "flare"), connect=here(request, notes))
    assert learned(tmp_path / "local") == learned(tmp_path / "flare")
    assert {"adapter_model.safetensors", "history.jsonl"} <= learned(tmp_path / "flare").keys()
    assert len(notes) == 1
    assert "127.0.0.1" in notes[0]


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed", "fedavg"])
def test_processes_end_with_the_joined_checkpoint_of_the_simulation(
    requests: Maker, tmp_path: Path, strategy: str
) -> None:
    chosen = {} if strategy == "fedavg" else {"cut_layer": 1}
    request = requests(strategy=strategy, fleet=THREE, rounds=3, learning_rate=1e-3, **chosen)
    split = split_request(request)
    launch(split, OutputOptions(tmp_path / "local"))
    launch(split, OutputOptions(tmp_path / "flare"), connect=here(split, []))
    assert learned(tmp_path / "local") == learned(tmp_path / "flare")
    assert {"model.safetensors", "history.jsonl"} <= learned(tmp_path / "flare").keys()


@pytest.fixture
def launcher(requests: Maker, tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(requests, tmp_path, rounds=6)
    yield made
    made.kill_all()


def test_a_killed_server_takes_its_devices_with_it_and_resumes_to_the_same_bytes(launcher: Launcher) -> None:
    local = launcher.start("local")
    running = launcher.start("flare", "--engine", "nvflare", "--clock", "fleet")
    eventually(lambda: launcher.rounds("flare") >= 2 or running.poll() is not None, SOON)
    assert len(launcher.processes("flare")) == 1 + 2 * 3
    running.kill()
    running.communicate()
    eventually(lambda: not launcher.processes("flare"), SOON)
    assert launcher.rounds("flare") < 6
    resumed = launcher.start("flare", "--engine", "nvflare", "--clock", "fleet", "--resume")
    _, told = resumed.communicate(timeout=SOON)
    assert resumed.returncode == 0, told
    assert local.wait(SOON) == 0
    assert learned(launcher.folder / "flare") == learned(launcher.folder / "local")
    assert not launcher.processes("flare")
    assert not launcher.work("flare").exists()
    facts = json.loads((launcher.folder / "flare" / "spine.json").read_text())
    assert (facts["parameters"]["engine"], facts["parameters"]["clock"]) == ("nvflare", "fleet")
    assert "engine" not in json.loads((launcher.folder / "local" / "spine.json").read_text())["parameters"]


def test_an_interrupted_run_leaves_no_process(launcher: Launcher) -> None:
    running = launcher.start("flare", "--engine", "nvflare")
    eventually(lambda: launcher.rounds("flare") >= 1 or running.poll() is not None, SOON)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=SOON)
    assert running.returncode == 130
    assert "--resume" in told
    eventually(lambda: not launcher.processes("flare"), SOON)


def test_a_fleet_too_large_for_one_machine_is_refused(requests: Maker) -> None:
    request = requests(fleet={"slow": 30, "fast": 3}, examples=200)
    with pytest.raises(OptionError, match="--devices 3"):
        require_few(request)


def test_a_device_that_cannot_take_part_ends_the_run_in_a_sentence(
    requests: Maker, tmp_path: Path, written: Callable[[Recipe], Path]
) -> None:
    request = requests(strategy="fedit", fleet=THREE)
    other = replace(request, source=describe_source("other", written(recipe("llama"))))
    with pytest.raises(FederationError, match="is not the checkpoint of this run"):
        launch(other, OutputOptions(tmp_path / "flare"), connect=here(other, []))
