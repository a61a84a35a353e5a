from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from launched import THREE, Launcher, eventually
from small_federations import Maker
from sums import learned

from spinecli.artifacts.directory import OutputOptions
from spinecli.federation.launch import launch
from spinecli.remote.launch_flower import on_this_machine

pytestmark = pytest.mark.slow

SOON = 600.0


@pytest.mark.parametrize("strategy", ["fedit", "legend", "fedspine", "fedspine-model"])
def test_supernodes_end_with_the_bytes_of_the_simulation(requests: Maker, tmp_path: Path, strategy: str) -> None:
    request = requests(strategy=strategy, fleet=THREE, rounds=3)
    launch(request, OutputOptions(tmp_path / "local"))
    notes: list[str] = []
    launch(
        request, OutputOptions(tmp_path / "flower"), connect=lambda state: on_this_machine(request, state, notes.append)
    )
    assert learned(tmp_path / "local") == learned(tmp_path / "flower")
    assert {"adapter_model.safetensors", "history.jsonl"} <= learned(tmp_path / "flower").keys()
    assert len(notes) == 1
    assert "127.0.0.1" in notes[0]


class Flower(Launcher):
    """Three rounds over SuperNodes, or over the simulation."""

    def supernodes(self) -> list[int]:
        return [process for process, line in self.processes("flower").items() if "spinecli.remote.supernode" in line]

    def listening(self) -> set[str]:
        """Addresses that the run's processes listen at, as the kernel writes them, without ports."""
        sockets = set()
        for process in self.processes("flower"):
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
def launcher(requests: Maker, tmp_path: Path) -> Iterator[Flower]:
    made = Flower(requests, tmp_path, rounds=3)
    yield made
    made.kill_all()


def test_a_killed_device_leaves_the_rounds_to_the_others(launcher: Flower) -> None:
    running = launcher.start("flower", "--engine", "flower")
    eventually(lambda: launcher.rounds("flower") >= 1 or running.poll() is not None, SOON)
    assert launcher.listening() == {"0100007F"}
    os.kill(launcher.supernodes()[0], signal.SIGKILL)
    _, told = running.communicate(timeout=SOON)
    assert running.returncode == 0, told
    eventually(lambda: not launcher.processes("flower"), SOON)
    history = [json.loads(line) for line in (launcher.folder / "flower" / "history.jsonl").read_text().splitlines()]
    lost = [sorted(str(device["lost"]) for device in record["devices"]) for record in history]
    assert lost == [["None"] * 3, ["None", "None", "failed"], ["None", "None", "failed"]]
    assert not launcher.work("flower").exists()
    assert not (launcher.home / ".flwr").exists()


def test_an_interrupted_run_leaves_no_process_and_nothing_of_flower(launcher: Flower) -> None:
    running = launcher.start("flower", "--engine", "flower")
    eventually(lambda: len(launcher.supernodes()) == 3 or running.poll() is not None, SOON)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=SOON)
    assert running.returncode == 130, told
    assert "--resume" in told
    eventually(lambda: not launcher.processes("flower"), SOON)
    assert list(launcher.work("flower").rglob("flower")) == []


def test_a_killed_server_takes_its_devices_with_it_and_resumes_to_the_same_bytes(launcher: Flower) -> None:
    by_the_fleet = ("--engine", "flower", "--clock", "fleet")
    running = launcher.start("flower", *by_the_fleet)
    eventually(lambda: launcher.rounds("flower") >= 1 or running.poll() is not None, SOON)
    running.kill()
    running.communicate()
    eventually(lambda: not launcher.processes("flower"), SOON)
    assert launcher.rounds("flower") < 3
    resumed = launcher.start("flower", *by_the_fleet, "--resume")
    _, told = resumed.communicate(timeout=SOON)
    assert resumed.returncode == 0, told
    local = launcher.start("local")
    _, told = local.communicate(timeout=SOON)
    assert local.returncode == 0, told
    assert learned(launcher.folder / "flower") == learned(launcher.folder / "local")
