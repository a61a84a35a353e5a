from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from small_federations import LLAMA, Maker

from spinecli.artifacts.directory import OutputOptions
from spinecli.federation.run import launch
from spinecli.remote.launch_flower import on_this_machine

pytestmark = pytest.mark.slow

THREE = {"slow": 2, "fast": 1}
SOON = 600.0
_MARK = "SPINE_TEST_RUN"


def digests(directory: Path) -> dict[str, str]:
    """Sums of everything that a run has written, but its page of facts, which names the engine."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("spine.json", "history.png")
    }


@pytest.mark.parametrize("strategy", ["fedit", "legend", "fedspine"])
def test_supernodes_end_with_the_bytes_of_the_simulation(requests: Maker, tmp_path: Path, strategy: str) -> None:
    request = requests(strategy=strategy, fleet=THREE, rounds=3)
    launch(request, OutputOptions(tmp_path / "local"))
    notes: list[str] = []
    launch(
        request, OutputOptions(tmp_path / "flower"), connect=lambda state: on_this_machine(request, state, notes.append)
    )
    assert digests(tmp_path / "local") == digests(tmp_path / "flower")
    assert {"adapter_model.safetensors", "history.jsonl"} <= digests(tmp_path / "flower").keys()
    assert len(notes) == 1
    assert "127.0.0.1" in notes[0]


class Command:
    """`spine fed-launch --engine flower` in a process that can be interrupted, and whatever it starts."""

    def __init__(self, requests: Maker, folder: Path) -> None:
        options = requests.options(LLAMA, fleet=THREE)
        self.folder, self.out, self.home = folder, folder / "out", folder / "home"
        self.home.mkdir()
        self._arguments = [
            *("fed-launch", options.model, "--data", options.data, "--fleet", options.fleet, "--strategy", "fedspine"),
            *("--rounds", "3", "--cohort", "3", "--local-steps", "3", "--batch-size", "4", "--max-length", "16"),
            *("--rank", "4", "--smallest-rank", "2", "--largest-rank", "6", "--prune-interval", "1"),
        ]

    def start(self, *more: str) -> subprocess.Popen[str]:
        environment = {**os.environ, _MARK: str(self.out), "OMP_NUM_THREADS": "1", "HOME": str(self.home)}
        chosen = more or ("--engine", "flower")
        command = [sys.executable, "-m", "spinecli", *self._arguments, "--out", str(self.out), *chosen]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def processes(self) -> dict[int, str]:
        """What belongs to the run, with its command line."""
        found, mark = {}, f"{_MARK}={self.out}".encode()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # ended, or not ours
        return found

    def supernodes(self) -> list[int]:
        return [process for process, line in self.processes().items() if "spinecli.remote.supernode" in line]

    def rounds(self) -> int:
        path = self.out.with_name(f".{self.out.name}.spine-work") / "files" / "history.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def listening(self) -> set[str]:
        """Addresses that the run's processes listen at, as the kernel writes them, without ports."""
        sockets = set()
        for process in self.processes():
            for file in Path(f"/proc/{process}/fd").glob("*"):
                try:
                    sockets.add(str(file.readlink()))
                except OSError:
                    continue  # closed meanwhile
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                    found.add(words[1].partition(":")[0])
        return found


@pytest.fixture
def command(requests: Maker, tmp_path: Path) -> Iterator[Command]:
    made = Command(requests, tmp_path)
    yield made
    for process in made.processes():
        os.kill(process, signal.SIGKILL)


def eventually(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_killed_device_leaves_the_rounds_to_the_others(command: Command) -> None:
    running = command.start()
    eventually(lambda: command.rounds() >= 1 or running.poll() is not None)
    assert command.listening() == {"0100007F"}
    os.kill(command.supernodes()[0], signal.SIGKILL)
    _, told = running.communicate(timeout=SOON)
    assert running.returncode == 0, told
    eventually(lambda: not command.processes())
    history = [json.loads(line) for line in (command.out / "history.jsonl").read_text().splitlines()]
    lost = [sorted(str(device["lost"]) for device in record["devices"]) for record in history]
    assert lost == [["None"] * 3, ["None", "None", "failed"], ["None", "None", "failed"]]
    assert [path.name for path in command.out.parent.iterdir() if path.name.startswith(".out")] == []
    assert not (command.home / ".flwr").exists()


def test_an_interrupted_run_leaves_no_process_and_nothing_of_flower(command: Command) -> None:
    running = command.start()
    eventually(lambda: len(command.supernodes()) == 3 or running.poll() is not None)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=SOON)
    assert running.returncode == 130, told
    assert "--resume" in told
    eventually(lambda: not command.processes())
    work = command.out.with_name(f".{command.out.name}.spine-work")
    assert list(work.rglob("flower")) == []


def test_a_killed_server_takes_its_devices_with_it_and_resumes_to_the_same_bytes(command: Command) -> None:
    by_the_fleet = ("--engine", "flower", "--clock", "fleet")
    running = command.start(*by_the_fleet)
    eventually(lambda: command.rounds() >= 1 or running.poll() is not None)
    running.kill()
    running.communicate()
    eventually(lambda: not command.processes())
    assert command.rounds() < 3
    resumed = command.start(*by_the_fleet, "--resume")
    _, told = resumed.communicate(timeout=SOON)
    assert resumed.returncode == 0, told
    flower = command.out.rename(command.folder / "flower")
    local = command.start("--engine", "local")
    _, told = local.communicate(timeout=SOON)
    assert local.returncode == 0, told
    assert digests(flower) == digests(command.out)
