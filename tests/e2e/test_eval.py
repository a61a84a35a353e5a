"""`spine eval` as a user starts it: a process of its own, nothing but its arguments, no network."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import spinecli
from spinecli.artifacts.manifest import damaged_files, read_manifest

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "tiny_checkpoint.py")))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/, thinner/, words.txt and tasks/ in one directory."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny.write_tiny_checkpoint(folder / "dense")
    tiny.write_tiny_checkpoint(folder / "thinner", seed=1, channels=24)
    (folder / "words.txt").write_text(tiny.random_words(600))
    tiny.write_task(folder / "tasks")
    return folder


def _spine(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(spinecli.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "spinecli", "eval", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_two_models_by_every_measure(workshop: Path) -> None:
    finished = _spine(
        workshop,
        *("thinner", "--against", "dense", "--perplexity", "words.txt", "--window", "32", "--stride", "16"),
        *("--tasks", "tiny_choice", "--include-path", "tasks", "--limit", "6", "--num-fewshot", "1"),
        *("--latency", "--prompt-length", "8", "--new-tokens", "4", "--repeats", "2", "--threads", "1"),
        *("--out", "results", "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert [model["label"] for model in found["models"]] == ["dense", "thinner"]
    for model in found["models"]:
        assert model["perplexity"][0]["scored_tokens"] == 31 + 35 * 16
        assert model["lm_eval"]["n-shot"] == {"tiny_choice": 1}
        assert model["lm_eval"]["results"]["tiny_choice"]["sample_len"] == 6
        assert len(model["latency"]["decode"]["samples"]) == 2
    figures = {row["figure"]: row for row in found["comparison"]}
    assert figures["block parameters"]["ratios"][1] < 1
    assert finished.stderr.splitlines() == [
        "words.txt has 36 windows, fewer than 40.",
        finished.stderr.splitlines()[-1],
    ]
    assert finished.stderr.splitlines()[-1].endswith("to results.")

    manifest = read_manifest(workshop / "results")
    assert damaged_files(workshop / "results", manifest) == {}
    assert json.loads((workshop / "results" / "results.json").read_text()) == found
    assert "<table>" in (workshop / "results" / "report.html").read_text()


def test_a_mistake_in_one_sentence(workshop: Path) -> None:
    (workshop / "thinner" / "model.safetensors").rename(workshop / "thinner" / "pytorch_model.bin")
    try:
        finished = _spine(workshop, "thinner", "--latency", "--out", "refused")
    finally:
        (workshop / "thinner" / "pytorch_model.bin").rename(workshop / "thinner" / "model.safetensors")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: thinner holds pytorch_model.bin, a pickle, and no safetensors")
    assert len(finished.stderr.splitlines()) == 1
    assert not list(workshop.glob("*refused*"))
