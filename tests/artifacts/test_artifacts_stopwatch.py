from __future__ import annotations

import pytest
import torch

import spinecli.artifacts.stopwatch as stopwatch_module
from spinecli.artifacts.stopwatch import Stopwatch, peak_memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(stopwatch_module.time, "perf_counter", lambda: now[0])
    return now


def test_nested_phases_add_up_to_the_whole(clock: list[float]) -> None:
    stopwatch = Stopwatch()
    with stopwatch("computing"):
        clock[0] += 1
        with stopwatch("reading"):
            clock[0] += 2
            with stopwatch("computing"):
                clock[0] += 4
        clock[0] += 8
    with stopwatch("writing"):
        clock[0] += 16
    seconds = stopwatch.measured().seconds
    assert seconds == {"computing": 13.0, "reading": 2.0, "writing": 16.0, "total": 31.0}


def test_time_outside_any_phase_counts_only_in_total(clock: list[float]) -> None:
    stopwatch = Stopwatch()
    clock[0] += 3
    with stopwatch("reading"):
        clock[0] += 1
    clock[0] += 5
    assert stopwatch.measured().seconds == {"reading": 1.0, "total": 9.0}


def test_an_error_ends_its_phase(clock: list[float]) -> None:
    stopwatch = Stopwatch()
    with pytest.raises(RuntimeError), stopwatch("reading"):  # noqa: PT012
        clock[0] += 1
        raise RuntimeError
    clock[0] += 2
    assert stopwatch.measured().seconds == {"reading": 1.0, "total": 3.0}


def test_versions_of_what_decides_the_numbers() -> None:
    versions = Stopwatch().measured().versions
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"spine", "python", "transformers", "safetensors"} <= set(versions)


def test_peak_memory_is_in_bytes() -> None:
    peak = peak_memory()
    assert peak is None or 10_000_000 < peak < 1 << 40
