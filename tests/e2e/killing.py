"""Ending a running `spine` at a chosen moment, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from spine_process import start_spine

from spinecli.data.calibration_file import CALIBRATION_NAME

Moment = Callable[[Path], bool]
"""Whether the work directory of a run shows that the moment has come."""


def work_of(out: Path) -> Path:
    return out.parent / f".{out.name}.spine-work"


def there_is(*patterns: str) -> Moment:
    """The moment when a file that fits one of these patterns has appeared in the work directory."""
    return lambda work: any(path for pattern in patterns for path in work.glob(pattern))


def end_at(moment: Moment, out: Path, *arguments: object, by: int = signal.SIGKILL) -> tuple[int, str]:
    """Start `spine ... --out out`, end it by a signal as soon as the moment has come: its exit code and stderr.

    A run that ends before it is caught has the code 0.
    """
    process = start_spine(*arguments, "--out", out)
    while process.poll() is None and not moment(work_of(out)):
        time.sleep(0.001)
    return _end(process, by)


def end_after(seconds: float, out: Path, *arguments: object) -> tuple[int, str]:
    """Start `spine ... --out out` and kill it after a time."""
    process = start_spine(*arguments, "--out", out)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return _end(process, signal.SIGKILL)


def _end(process: subprocess.Popen[str], by: int) -> tuple[int, str]:
    if process.poll() is None:
        os.kill(process.pid, by)
    _, said = process.communicate()
    return process.returncode, said


def stage(out: Path) -> str:
    """How far a killed run had come, read from what it left."""
    work = work_of(out)
    if not work.exists():
        return "finished" if out.exists() else "nothing begun"
    if any(path.name != CALIBRATION_NAME for path in (work / "files").glob("*")):
        return "writing"
    journals = [path for path in (work / "state").glob("*.safetensors") if not path.name.startswith("tuned-")]
    if not journals:
        return "begun"
    newest = max(journals, key=lambda path: path.stat().st_mtime_ns)
    with safe_open(newest, framework="pt") as handle:
        return f"{newest.stem}, {json.loads(handle.metadata()['journal'])['finished']} blocks saved"


def clear(out: Path) -> None:
    for path in (out, work_of(out)):
        shutil.rmtree(path, ignore_errors=True)
