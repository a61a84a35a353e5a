"""Several processes train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import recipe

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.config import make_config
from spinecli.data.config import CalibrationConfig
from spinecli.healing.config import HealConfig
from spinecli.healing.request import open_request
from spinecli.healing.run import heal
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

TRAINING = {"tokens": 4_000, "text_length": 32, "batch_size": 5, "learning_rate": 3e-3, "rank": 4}


def launched(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "spinecli", *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_train_as_one_does(written: Any, sample_file: Path, tmp_path: Path) -> None:
    calibration = CalibrationConfig(text=(str(sample_file),), rows=24, length=16)
    model = str(written(recipe("llama", grouped=True, blocks=4)))
    asked = PruneConfig(model=model, sparsity=0.4, method="magnitude", calibration=calibration)
    prune(open_prune(asked), OutputOptions(tmp_path / "cut"))
    config = make_config(HealConfig, str(tmp_path / "cut"), TRAINING)
    alone: Any = heal(open_request(config), OutputOptions(tmp_path / "alone")).report

    options = [word for name, value in TRAINING.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = launched(2, "heal", tmp_path / "cut", *options, "--out", tmp_path / "both", "--json")
    assert done.returncode == 0, done.stderr
    together: Any = read_manifest(tmp_path / "both").report
    assert json.loads(done.stdout)["out"] == str(tmp_path / "both")
    assert not damaged_files(tmp_path / "both", read_manifest(tmp_path / "both"))
    for one, two in zip(alone["curve"], together["curve"], strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert together["kept"] == "healed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both", "cut"]
