"""The `spine` command as a user's shell runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sums import contents

TIMEOUT = 300


@dataclass(frozen=True)
class Finished:
    """How a process ended and what it said."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as the one JSON object that --json promises."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value


Here = Callable[..., Finished]
"""Runs `spine` inside the test's own process; see the fixture `spine_here`."""


def spine_command() -> list[str]:
    """The installed console script, or the module where none is installed."""
    script = shutil.which("spine")
    return [script] if script else [sys.executable, "-m", "spinecli"]


def environment(**more: str) -> dict[str, str]:
    """One thread, no network, and no variable that would hide what a user sees."""
    kept = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **more}


def run(command: list[str], *, cwd: Path | None = None, timeout: float = TIMEOUT, **env: str) -> Finished:
    done = subprocess.run(
        command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def spine(*arguments: object, cwd: Path | None = None, timeout: float = TIMEOUT, **env: str) -> Finished:
    """Run `spine` to its end."""
    return run([*spine_command(), *map(str, arguments)], cwd=cwd, timeout=timeout, **env)


def start_spine(*arguments: object) -> subprocess.Popen[str]:
    """Start `spine` and leave it running; what it says is kept for `communicate`."""
    command = [*spine_command(), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@dataclass(frozen=True)
class Step:
    """A command that was run, without its --out, and what came of it."""

    arguments: tuple[str, ...]
    out: Path
    finished: Finished

    @property
    def contents(self) -> dict[str, str]:
        return contents(self.out)


def run_step(out: Path, *arguments: object) -> Step:
    words = tuple(map(str, arguments))
    finished = spine(*words, "--out", out)
    assert finished.code == 0, finished.stderr
    return Step(words, out, finished)
