from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_checkpoint import WORDS, write_tiny_checkpoint
from typer.testing import CliRunner

from spinecli.artifacts.manifest import Manifest, Source, read_manifest, record_files
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.commands.eval import evaluate

app = typer.Typer(pretty_exceptions_enable=False)
app.command("eval")(evaluate)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _written_by_spine(directory: Path, dense: str) -> Path:
    """Give a checkpoint the manifest that a pruning of `dense` would have."""
    source = Source(reference=dense, files={})
    step = {"kind": "dense-checkpoint", "command": "", "reference": dense, "digest": source.digest, "summary": ""}
    manifest = Manifest.model_validate(
        {
            "kind": "pruned-checkpoint",
            "command": "prune",
            "parameters": {},
            "seed": 0,
            "inputs": {"model": source},
            "outputs": record_files(directory),
            "lineage": [step],
            "summary": "",
            "report": {},
            "measured": Stopwatch().measured(),
        }
    )
    manifest.sealed().write(directory)
    return directory


def test_the_command_is_light_until_it_runs() -> None:
    heavy = {"torch", "transformers", "lm_eval", "peft", "matplotlib"}
    code = f"import sys, spinecli.commands.eval; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_table_for_a_person(dense: Path, thinner: Path, text_file: Path) -> None:
    result = _run(thinner, "--against", dense, "--perplexity", text_file, "--window", 32, "--stride", 16, "--rows", 5)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["dense", "thinner", "×"]
    assert any(line.startswith("perplexity, words.txt") for line in lines)
    assert "5 windows of 32 tokens, stride 16" in result.stdout
    assert result.stderr == ""


def test_json_and_nothing_else(dense: Path, text_file: Path) -> None:
    result = _run(dense, "--perplexity", text_file, "--json")
    found = json.loads(result.stdout)
    assert found["models"][0]["perplexity"][0]["window"] == 96
    assert found["comparison"][0]["figure"] == "parameters"


def test_without_a_measure_perplexity_and_speed(dense: Path) -> None:
    result = _run(dense, "--prompt-length", 8, "--new-tokens", 3, "--repeats", 1, "--rows", 2, "--json")
    assert "No measure was named: perplexity on builtin:python-docs, and speed." in result.stderr
    found = json.loads(result.stdout)["models"][0]
    assert found["perplexity"][0]["text"] == "builtin:python-docs"
    assert found["latency"]["decode"]["median"] > 0
    assert found["memory"] is None


def test_the_dense_source_is_suggested(tmp_path: Path, text_file: Path) -> None:
    pruned = _written_by_spine(write_tiny_checkpoint(tmp_path / "pruned"), "some/dense")
    asked = (pruned, "--perplexity", text_file, "--rows", 2)
    hint = "--against some/dense would compare with the checkpoint that pruned was made from."
    assert hint in _run(*asked).stderr
    assert hint not in _run(*asked, "--against", pruned).stderr
    assert _run(*asked, "--quiet").stderr == ""


def test_descendants_of_the_built_in_model_are_measured_on_its_language(tmp_path: Path) -> None:
    pruned = _written_by_spine(write_tiny_checkpoint(tmp_path / "pruned"), "builtin:tiny")
    result = _run(pruned, "--rows", 1, "--prompt-length", 4, "--new-tokens", 2, "--repeats", 1)
    assert "perplexity on builtin:tiny-evaluation" in result.stderr


def test_an_adapter_beside_its_base(dense: Path, adapter: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--perplexity", text_file, "--against", dense, "--adapter", adapter, "--out", out, "--json")
    result = _run(dense, *asked)
    assert result.exit_code == 0, result.output
    plain, adapted = json.loads(result.stdout)["models"]
    assert (plain["adapter"], adapted["adapter"]) == (None, str(adapter))
    assert adapted["perplexity"][0]["computed_by"] == "loaded model"
    assert adapted["perplexity"][0]["nll"] != plain["perplexity"][0]["nll"]
    assert set(read_manifest(out).inputs) == {"model", "against 1", "adapter", "text 1"}


def test_models_with_other_tokenizers_get_no_ratio(dense: Path, tmp_path: Path, text_file: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", words=WORDS[::-1])
    result = _run(other, "--against", dense, "--perplexity", text_file, "--json")
    assert "other cuts words.txt into other tokens than dense" in result.stderr
    rows = {row["figure"]: row for row in json.loads(result.stdout)["comparison"]}
    assert rows["perplexity, words.txt"]["ratios"] == [1.0, None]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--window", "200", "--perplexity", "TEXT"], "exceed the 96 positions of dense"),
        (["--window", "8", "--stride", "9", "--perplexity", "TEXT"], "The stride must lie between 1 and"),
        (["--latency", "--stride", "9"], "--stride belongs to --perplexity"),
        (["--latency", "--num-fewshot", "2"], "--num-fewshot belongs to --tasks"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--tasks", "tiny_close"], "There is no task 'tiny_close'; did you mean tiny_cloze"),
        (["--stride", "9", "--tasks", "tiny_cloze"], "--stride belongs to --perplexity"),
        (["--perplexity", "TEXT", "--max-length", "9"], "--max-length belongs to --labelled"),
        (["--latency", "--prompt-length", "90"], "90 and 32 new tokens exceed the 96 positions"),
        (["--perplexity", "/"], "/ is a directory"),
        (["--perplexity", "builtin:nothing"], "There is no text builtin:nothing"),
        (["--perplexity", "TEXT", "--against", "absent"], "absent does not exist"),
        (["--perplexity", "TEXT", "--adapter", "absent"], "absent is not a directory"),
        (["--perplexity", "TEXT", "--device", "gpu"], "--device gpu cannot be used here"),
        (["--perplexity", "EMPTY"], "holds no text"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(
    dense: Path, text_file: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    named = {"TEXT": str(text_file), "EMPTY": str(empty)}
    result = _run(dense, *(named.get(argument, argument) for argument in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_an_existing_output_is_refused_before_anything_is_measured(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.evaluation.session.Session.measure", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    result = _run(dense, "--perplexity", text_file, "--out", tmp_path / "mine", "--overwrite")
    assert result.exit_code == 2
    assert "holds files that spine did not write" in result.stderr


def test_a_changed_checkpoint_is_refused_before_it_is_measured(tmp_path: Path, text_file: Path) -> None:
    pruned = _written_by_spine(write_tiny_checkpoint(tmp_path / "pruned"), "some/dense")
    shutil.copy(write_tiny_checkpoint(tmp_path / "other", seed=5) / "model.safetensors", pruned)
    result = _run(pruned, "--perplexity", text_file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "model.safetensors is not the file that spine wrote" in result.stderr
    assert not (tmp_path / "out").exists()
