"""Seconds by phase and the peak resident memory of this process."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from spinecli.artifacts.manifest import Measured, current_versions


class Stopwatch:
    """Adds up wall-clock seconds under the names of phases (`reading`, `computing`, `writing`, ...).

    Phases nest: while an inner one runs, the outer one stands still, so the parts add up to the whole.
    """

    def __init__(self) -> None:
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = self._begin

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the enclosed time under `phase`."""
        self._credit()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._credit()
            self._stack.pop()

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._stack:
            phase = self._stack[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def measured(self) -> Measured:
        """The figures so far, with `total` counted from construction."""
        seconds = {phase: round(value, 3) for phase, value in self._seconds.items()}
        seconds["total"] = round(time.perf_counter() - self._begin, 3)
        return Measured(
            started=self.started, seconds=seconds, peak_memory_bytes=peak_memory(), versions=current_versions()
        )


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not count it.

    On Linux the kernel's high-water mark of this address space: the peak that `getrusage` reports there includes the
    size that the parent process had when it started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Hand freed memory back to the system: glibc keeps tensors of tens of megabytes, and more with every use."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
