"""A real device's time: between two charges, as it passes."""

from __future__ import annotations

import time


class StopwatchMeter:
    """Counts the seconds since the last charge under the phase that the next one names."""

    def __init__(self) -> None:
        self._last = self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        """A new job."""
        self._last = self._began = time.perf_counter()
        self._seconds = {}

    def charge(self, phase: str, flops: float) -> None:
        """The time since the last charge was spent on `phase`."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def seconds(self, phase: str) -> float:
        """Seconds charged to `phase` in this job."""
        return self._seconds.get(phase, 0.0)

    @property
    def total(self) -> float:
        """Seconds since the job began."""
        return time.perf_counter() - self._began
