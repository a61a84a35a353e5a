from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from families import Recipe, recipe

pytest.importorskip("nvflare")

from small_federations import LLAMA, Maker

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.source import describe_source
from spinecli.errors import FederationError, OptionError
from spinecli.federation.engine import Connect
from spinecli.federation.request import FederatedRequest, open_request
from spinecli.federation.run import launch
from spinecli.remote.furnish import require_few
from spinecli.remote.launch import on_this_machine
from spinecli.split.request import SplitRequest, split_options, split_request
from spinecli.split.run import launch as launch_split

pytestmark = pytest.mark.slow

THREE = {"slow": 2, "fast": 1}
SOON = 300.0
_MARK = "SPINE_TEST_RUN"


def here(request: FederatedRequest, split: SplitRequest | None, notes: list[str]) -> Connect:
    return lambda state: on_this_machine(request, split, state, notes.append)


def digests(directory: Path) -> dict[str, str]:
    """Sums of everything that a run has written, but its page of facts, which names the engine."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("spine.json", "history.png")
    }


@pytest.mark.parametrize("strategy", ["fedit", "legend", "fedspine"])
def test_processes_end_with_the_bytes_of_the_simulation(requests: Maker, tmp_path: Path, strategy: str) -> None:
    request = requests(strategy=strategy, fleet=THREE, rounds=3)
    launch(request, OutputOptions(tmp_path / "local"))
    notes: list[str] = []
    launch(request, OutputOptions(tmp_path / "flare"), connect=here(request, None, notes))
    assert digests(tmp_path / "local") == digests(tmp_path / "flare")
    assert {"adapter_model.safetensors", "history.jsonl"} <= digests(tmp_path / "flare").keys()
    assert len(notes) == 1
    assert "127.0.0.1" in notes[0]


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed", "fedavg"])
def test_processes_end_with_the_joined_checkpoint_of_the_simulation(
    requests: Maker, tmp_path: Path, strategy: str
) -> None:
    options = requests.options(strategy=strategy, fleet=THREE, rounds=3, learning_rate=1e-3)
    request = open_request(options)
    chosen = {} if strategy == "fedavg" else {"--cut-layer": "1"}
    split = split_request(request, split_options(chosen, options))
    launch_split(split, OutputOptions(tmp_path / "local"))
    launch_split(split, OutputOptions(tmp_path / "flare"), connect=here(request, split, []))
    assert digests(tmp_path / "local") == digests(tmp_path / "flare")
    assert {"model.safetensors", "history.jsonl"} <= digests(tmp_path / "flare").keys()


class Command:
    """`spine fed-launch` in a process that can be killed, and whatever it starts."""

    def __init__(self, requests: Maker, folder: Path) -> None:
        options = requests.options(LLAMA, fleet=THREE)
        self.folder = folder
        self._arguments = [
            *("fed-launch", options.model, "--data", options.data, "--fleet", options.fleet, "--strategy", "fedspine"),
            *("--rounds", "6", "--cohort", "3", "--local-steps", "3", "--batch-size", "4", "--max-length", "16"),
            *("--rank", "4", "--smallest-rank", "2", "--largest-rank", "6", "--prune-interval", "1"),
        ]

    def __call__(self, out: str, *more: str) -> subprocess.Popen[str]:
        environment = {**os.environ, _MARK: str(self.folder / out), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "spinecli", *self._arguments, "--out", str(self.folder / out), *more]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def processes(self, out: str) -> list[int]:
        """What is running in the name of a run."""
        mark = f"{_MARK}={self.folder / out}".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
            except OSError:
                continue  # ended, or not ours
        return found

    def rounds(self, out: str) -> int:
        path = self.folder / f".{out}.spine-work" / "files" / "history.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.fixture
def command(requests: Maker, tmp_path: Path) -> Iterator[Command]:
    made = Command(requests, tmp_path)
    yield made
    for out in ("flare", "local"):
        for process in made.processes(out):
            os.kill(process, signal.SIGKILL)


def eventually(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_killed_server_takes_its_devices_with_it_and_resumes_to_the_same_bytes(command: Command) -> None:
    local = command("local")
    running = command("flare", "--engine", "nvflare", "--clock", "fleet")
    eventually(lambda: command.rounds("flare") >= 2 or running.poll() is not None)
    assert len(command.processes("flare")) == 1 + 2 * 3
    running.kill()
    running.communicate()
    eventually(lambda: not command.processes("flare"))
    assert command.rounds("flare") < 6
    resumed = command("flare", "--engine", "nvflare", "--clock", "fleet", "--resume")
    _, told = resumed.communicate(timeout=SOON)
    assert resumed.returncode == 0, told
    assert local.wait(SOON) == 0
    assert digests(command.folder / "flare") == digests(command.folder / "local")
    assert not command.processes("flare")
    assert not (command.folder / ".flare.spine-work").exists()
    facts = json.loads((command.folder / "flare" / "spine.json").read_text())
    assert (facts["parameters"]["engine"], facts["parameters"]["clock"]) == ("nvflare", "fleet")
    assert "engine" not in json.loads((command.folder / "local" / "spine.json").read_text())["parameters"]


def test_an_interrupted_run_leaves_no_process(command: Command) -> None:
    running = command("flare", "--engine", "nvflare")
    eventually(lambda: command.rounds("flare") >= 1 or running.poll() is not None)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=SOON)
    assert running.returncode == 130
    assert "--resume" in told
    eventually(lambda: not command.processes("flare"))


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
        launch(other, OutputOptions(tmp_path / "flare"), connect=here(other, None, []))
