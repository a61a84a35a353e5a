from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spinecli.app import app

SMALL = ("--calibration-rows", 8, "--calibration-length", 32, "--window", 64, "--rows", 4)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def test_the_command_is_light_until_it_runs() -> None:
    code = (
        "import sys, spinecli.commands.sweep; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_table_for_a_person_and_one_object_for_a_program(tmp_path: Path) -> None:
    asked = ("builtin:tiny", "--sparsity", "0.2,0.5", "--methods", "magnitude", "--tune", "none", *SMALL)
    done = invoke(*asked, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("dense ", "magnitude-"))]
    assert names == ["dense", "magnitude-0.2", "magnitude-0.5"]
    assert "Ratios are to the dense model." in done.stdout
    assert "magnitude-0.5: " in done.stderr
    refused = invoke(*asked, "--out", tmp_path / "out")
    assert (refused.exit_code, "add --overwrite" in refused.stderr) == (2, True)
    told = invoke(*asked, "--out", tmp_path / "out", "--resume", "--json", "--quiet")
    assert (told.exit_code, told.stderr) == (0, "")
    value = json.loads(told.stdout)
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {key: value[key] for key in stored} == stored
    assert [row["sparsity"] for row in value["rows"]] == [0.0, 0.2, 0.5]
    assert list(stored["rows"][1]["perplexity"]) == ["builtin:tiny-evaluation"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sparsity", "0.5..0.1"), "runs backwards"),
        (("--sparsity", "0.3", "--step", "0.1"), "--step belongs to a range"),
        (("--sparsity", "0.3", "--methods", "sorcery"), "no method 'sorcery'"),
        (("--sparsity", "0.3", "--methods", "flap:adaptive"), "belongs to --method spine"),
        (("--sparsity", "0.3", "--tune", "sft"), "--tune must be one of"),
        (("--sparsity", "0.3", "--perplexity", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--sparsity", "0.3", "--calibration", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--sparsity", "0.3", "--device", "abacus"), "--device abacus"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = invoke("builtin:tiny", *options, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_told(tmp_path: Path) -> None:
    done = invoke("no-such-model", "--sparsity", "0.3", "--out", tmp_path / "out")
    assert (done.exit_code, "no-such-model does not exist" in done.stderr) == (2, True)
