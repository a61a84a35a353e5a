from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spinecli.errors import MeasurementError
from spinecli.evaluation.config import EvaluateConfig, GenerationConfig
from spinecli.evaluation.memory import measure_memory
from spinecli.evaluation.models import open_subjects

CONFIG = EvaluateConfig(
    model="dense", memory=True, threads=1, generation=GenerationConfig(prompt_length=8, new_tokens=2)
)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count from the start of the process")
def test_the_size_of_the_parent_does_not_count() -> None:
    ballast = torch.ones(100_000_000)
    code = "from spinecli.artifacts.stopwatch import peak_memory; print(peak_memory())"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < peak < ballast.nbytes / 2


def test_peak_of_loading_and_generating(dense: Path) -> None:
    (subject,) = open_subjects([(str(dense), None)])
    found = measure_memory(subject, CONFIG)
    assert found.peak_bytes == found.before_loading_bytes + found.added_bytes
    assert found.peak_bytes > 50e6
    assert 0 < found.added_bytes < 300e6
    assert found.device_peak_bytes is None


def test_a_probe_that_dies_is_an_error(dense: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (subject,) = open_subjects([(str(dense), None)])
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(MeasurementError, match=r"ended early \(signal 9\)"):
        measure_memory(subject, CONFIG)
