"""`spine eval` on classifiers as a user starts it, from what split training wrote to the report."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from spine_process import Here, Step, run_step, spine

from spinecli.artifacts.manifest import damaged_files, read_manifest

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "tiny_classifier.py")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of splits."""
    folder = tmp_path_factory.mktemp("trees")
    rows = tiny.sentences(60)
    tiny.write_sentences(folder / "train.csv", rows[:40])
    tiny.write_sentences(folder / "validation.csv", rows[40:])
    return folder


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory, dense: Path, data: Path) -> Step:
    return run_step(
        tmp_path_factory.mktemp("split") / "joined",
        *("fed-launch", dense, "--data", data, "--strategy", "mergesfl", "--fleet", "uniform-2", "--cohort", 2),
        *("--rounds", 1, "--local-steps", 1, "--batch-size", 2, "--json"),
    )


def test_a_joined_checkpoint_answers_as_its_run_says(joined: Step, data: Path, tmp_path: Path) -> None:
    other = tiny.write_classifier(tmp_path / "other", "bert")
    finished = spine(
        *("eval", joined.out, "--against", other, "--labelled", data, "--latency", "--memory"),
        *("--prompt-length", 8, "--repeats", 2, "--sequences", 2, "--threads", 1),
        *("--out", tmp_path / "results", "--json"),
    )
    assert finished.code == 0, finished.stderr
    found = finished.json
    assert [model["label"] for model in found["models"]] == ["other", "joined"]
    trained, measured = joined.finished.json, found["models"][1]["classification"]
    assert measured["accuracy"] == pytest.approx(trained["accuracy"])
    assert measured["nll"] == pytest.approx(trained["loss"], rel=1e-4)
    assert (measured["examples"], measured["matched_by"]) == (20, "name")
    for model in found["models"]:
        assert len(model["forward"]["rows"]["samples"]) == 2
        assert model["memory"]["added_bytes"] > 0
        assert model["latency"] is None
    figures = {row["figure"]: row for row in found["comparison"]}
    name = f"{data.name}/validation.csv"
    assert figures[f"accuracy, {name}"]["better"] == figures[f"macro F1, {name}"]["better"] == "higher"
    assert figures[f"loss, {name}"]["better"] == "lower"

    manifest = read_manifest(tmp_path / "results")
    assert damaged_files(tmp_path / "results", manifest) == {}
    assert {"model", "against 1", "labelled examples"} == set(manifest.inputs)
    assert [step.kind for step in manifest.lineage] == ["dense-checkpoint", "joined-checkpoint"]
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == found
    report = (tmp_path / "results" / "report.html").read_text()
    for figure in (f"accuracy, {name}", "forward, rows/s", "peak memory", "Labelled examples: 20, at most"):
        assert figure in report


def test_speed_alone_when_no_measure_is_named(joined: Step, spine_here: Here) -> None:
    finished = spine_here("eval", joined.out, "--prompt-length", 8, "--repeats", 1, "--threads", 1)
    assert finished.code == 0, finished.stderr
    assert finished.stderr.splitlines() == [
        "No measure was named: speed only; --labelled DATA would measure accuracy and loss."
    ]
    assert "forward, rows/s" in finished.stdout
    assert "accuracy" not in finished.stdout


def test_mistakes_in_one_sentence(joined: Step, dense: Path, data: Path, tmp_path: Path, spine_here: Here) -> None:
    for arguments, sentence in (
        ((dense, "--labelled", data), "--labelled measures classifiers and dense is a language model"),
        ((joined.out, "--perplexity", data), "--perplexity measures language models and joined is a classifier"),
        ((joined.out, "--against", dense, "--labelled", data), "joined is a classifier and dense is a language model"),
        ((joined.out, "--examples", 5), "--examples belongs to --labelled, which is not given"),
        ((joined.out, "--window", 32), "--window belongs to --perplexity, which is not given"),
        ((joined.out, "--labelled", "builtin:tiny-topics"), "has 4 labels (farm, hills, sea, town) and joined answers"),
    ):
        finished = spine_here("eval", *arguments, "--out", tmp_path / "out")
        assert finished.code == 2
        assert finished.stdout == ""
        (error,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
        assert sentence in error
        assert not (tmp_path / "out").exists()
