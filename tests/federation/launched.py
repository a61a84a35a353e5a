"""`spine fed-launch` in a process that can be interrupted, and whatever it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from small_federations import LLAMA, Maker

THREE = {"slow": 2, "fast": 1}
_MARK = "SPINE_TEST_RUN"


class Launcher:
    """Starts runs over three devices into directories of one folder, and finds the processes of each."""

    def __init__(self, requests: Maker, folder: Path, rounds: int) -> None:
        config = requests.config(LLAMA, fleet=THREE)
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        self._names: set[str] = set()
        self._arguments = [
            *("fed-launch", config.model, "--data", config.data.train, "--fleet", config.fleet),
            *("--strategy", "fedspine"),
            *("--rounds", str(rounds), "--cohort", "3", "--local-steps", "3", "--batch-size", "4"),
            *("--max-length", "16", "--rank", "4", "--smallest-rank", "2", "--largest-rank", "6"),
            *("--prune-interval", "1"),
        ]

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        """A run into `folder / name`."""
        self._names.add(name)
        out = self.folder / name
        environment = {**os.environ, _MARK: str(out), "OMP_NUM_THREADS": "1", "HOME": str(self.home)}
        command = [sys.executable, "-m", "spinecli", *self._arguments, "--out", str(out), *more]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def processes(self, name: str) -> dict[int, str]:
        """What is running in the name of a run, with its command line."""
        found, mark = {}, f"{_MARK}={self.folder / name}".encode()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # ended, or not ours
        return found

    def work(self, name: str) -> Path:
        """Where an unfinished run keeps what it has."""
        return self.folder / f".{name}.spine-work"

    def rounds(self, name: str) -> int:
        """Rounds that an unfinished run has saved."""
        path = self.work(name) / "files" / "history.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def kill_all(self) -> None:
        """Leave no process of any run behind."""
        for name in self._names:
            for process in self.processes(name):
                os.kill(process, signal.SIGKILL)


def eventually(holds: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)
