"""Where calibration text comes from, as a user names it: several texts, weights, and the model itself."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spine_process import Finished, Here, spine
from sums import contents

import spinecli
from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.journal import PassJournal
from spinecli.data import author
from spinecli.data.calibration_file import CALIBRATION_NAME, load_rows
from spinecli.data.config import CalibrationConfig
from spinecli.evaluation.sweep.config import SweepConfig
from spinecli.evaluation.sweep.request import open_request as open_sweep
from spinecli.evaluation.sweep.run import sweep
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request
from spinecli.pruning.run import prune

SMALL = ("--sparsity", 0.4, "--method", "comp", "--block-share", 0.5, "--calibration-rows", 8)
LENGTH = ("--calibration-length", 16)


def pruned_by(here: Here, dense: Path, out: Path, *words: object) -> Finished:
    named = [part for word in words for part in ("--calibration", word)]
    done = here("prune", dense, *SMALL, *LENGTH, *named, "--out", out, "--json")
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, dense: Path, text: Path, spine_here: Here) -> Path:
    """A checkpoint pruned on a file and on the model's own text. Tests must not change it."""
    out = tmp_path_factory.mktemp("mixed") / "pruned"
    done = pruned_by(spine_here, dense, out, text, "self:0.6")
    assert done.json["calibration"] == {"words.txt": 5, "self": 3}
    assert "5 rows of words.txt; 3 rows of text that the model writes itself" in " ".join(done.stderr.split())
    return out


def test_the_installed_command_takes_several_texts(dense: Path, text: Path, tmp_path: Path) -> None:
    named = ("--calibration", text, "--calibration", "self:1")
    done = spine("prune", dense, *SMALL, *LENGTH, *named, "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "calibrated on 4 rows of words.txt, 4 rows of self" in done.stdout
    assert load_rows(tmp_path / "out", 1000).kinds == ("words.txt", "self")


def test_a_mistake_in_a_word_writes_nothing(dense: Path, text: Path, tmp_path: Path, spine_here: Here) -> None:
    done = spine_here("prune", dense, *SMALL, "--calibration", f"{text}:0", "--out", tmp_path / "out")
    assert done.code == 2
    assert "a weight is a number above 0" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_options_has_a_list_or_a_word(dense: Path, text: Path, tmp_path: Path, spine_here: Here) -> None:
    said = spine_here("prune", dense, *SMALL, "--calibration", text, "--calibration", "self:0.5", "--print-config")
    assert f"  text:\n  - {text}\n  - self:0.5\n" in said.stdout
    (tmp_path / "options.yaml").write_text(said.stdout)
    again = spine_here("prune", "--config", tmp_path / "options.yaml", "--print-config")
    assert again.stdout == said.stdout
    (tmp_path / "word.yaml").write_text(f"model: {dense}\nsparsity: 0.4\ncalibration: {{text: self}}\n")
    assert "  text:\n  - self\n" in spine_here("prune", "--config", tmp_path / "word.yaml", "--print-config").stdout


def test_python_code_names_texts_as_a_keyword(dense: Path, text: Path, tmp_path: Path, mixed: Path) -> None:
    options = {"sparsity": 0.4, "method": "comp", "block_share": 0.5, "calibration_rows": 8, "calibration_length": 16}
    several = spinecli.prune(dense, calibration=[str(text), "self:0.6"], out=tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(mixed)
    assert several.figures["calibration"] == {"words.txt": 5, "self": 3}
    one = spinecli.prune(dense, calibration=str(text), **options)
    assert one.figures["calibration"] == {"words.txt": 8}


def test_without_a_text_the_model_writes_its_own(dense: Path, tmp_path: Path, spine_here: Here) -> None:
    done = pruned_by(spine_here, dense, tmp_path / "one")
    assert done.json["calibration"] == {"self": 8}
    pruned_by(spine_here, dense, tmp_path / "two", "self")
    one, two = (load_file(tmp_path / name / CALIBRATION_NAME)["tokens"] for name in ("one", "two"))
    assert torch.equal(one, two)


def test_a_dry_run_writes_no_text(dense: Path, monkeypatch: pytest.MonkeyPatch, spine_here: Here) -> None:
    monkeypatch.setattr(author, "whole_model", lambda *given: pytest.fail("the model was asked to write"))
    done = spine_here("prune", dense, *SMALL, *LENGTH, "--dry-run", "--score", "--json")
    assert done.code == 0, done.stderr
    assert "builtin:python-docs stands in for it" in " ".join(done.stderr.split())
    assert done.json["calibration"] == {"self": 8}


def test_inspect_shows_and_repeats_it(mixed: Path, text: Path, tmp_path: Path, spine_here: Here) -> None:
    shown = spine_here("inspect", mixed, "--verify")
    assert shown.code == 0
    assert "all sums agree" in shown.stdout
    assert f"- {text}" in spine_here("inspect", mixed, "--print-config").stdout
    (tmp_path / "recipe.yaml").write_text(spine_here("inspect", mixed, "--recipe").stdout)
    done = spine_here("run", tmp_path / "recipe.yaml", "--out", tmp_path / "again")
    assert done.code == 0, done.stderr
    assert contents(tmp_path / "again" / "pruned") == contents(mixed)


def test_tuning_reads_the_rows_and_writes_none(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spine_here: Here
) -> None:
    monkeypatch.setattr(author, "whole_model", lambda *given: pytest.fail("the model was asked to write"))
    request = open_tune(spinecli.TuneConfig(pruned=mixed))
    kept = load_rows(mixed, 1000)
    assert torch.equal(request.calibration.read().tokens, kept.tokens)
    assert request.inputs["calibration"].reference.endswith("words.txt self:0.6")
    assert tune(request, OutputOptions(tmp_path / "out")).kind == "tuned-checkpoint"
    fewer = spine_here("tune", mixed, "--calibration-rows", 4, "--calibration-length", 8, "--out", tmp_path / "fewer")
    assert fewer.code == 0, fewer.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--calibration-rows", 9), "--calibration-rows 9 exceeds the 8 that"),
        (("--calibration-length", 17), "--calibration-length 17 exceeds the 16 that"),
        (("--special-tokens", "none"), "--special-tokens belongs to --calibration"),
    ],
)
def test_tuning_on_more_than_was_kept_needs_a_text(
    mixed: Path, tmp_path: Path, text: Path, options: tuple[object, ...], told: str, spine_here: Here
) -> None:
    done = spine_here("tune", mixed, *options, "--out", tmp_path / "out")
    assert done.code == 2
    assert told in " ".join(done.stderr.split())
    named = spine_here("tune", mixed, *options, "--calibration", text, "--out", tmp_path / "out")
    assert named.code == 0, named.stderr


def test_tuning_can_let_the_dense_model_write(mixed: Path, tmp_path: Path, spine_here: Here) -> None:
    done = spine_here("tune", mixed, "--calibration", "self", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    assert "text that the model writes itself" in " ".join(done.stderr.split())


@pytest.mark.parametrize("damage", ["absent", "garbage", "changed"])
def test_damaged_rows_are_refused(mixed: Path, tmp_path: Path, damage: str, spine_here: Here) -> None:
    copy = shutil.copytree(mixed, tmp_path / "copy")
    file = copy / CALIBRATION_NAME
    if damage == "absent":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"garbage")
    else:
        tensors = load_file(file)
        save_file({**tensors, "tokens": tensors["tokens"] * 0 + 7}, file)
    done = spine_here("tune", copy, "--out", tmp_path / "out")
    assert done.code == 2
    said = " ".join(done.stderr.split())
    assert ("prune again" if damage == "absent" else CALIBRATION_NAME) in said


class StoppedError(Exception):
    """Stands for a kill."""


def test_a_run_stopped_while_the_model_writes_goes_on_there(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(author, "_BATCH", 2)
    monkeypatch.setattr("spinecli.artifacts.journal.PassJournal", partial(PassJournal, share=float("inf")))
    config = PruneConfig(
        model=str(dense),
        sparsity=0.4,
        method="magnitude",
        calibration=CalibrationConfig(text=("self",), rows=8, length=16),
    )
    whole = prune(open_request(config), OutputOptions(tmp_path / "whole"))
    seen: list[tuple[str, int]] = []

    def stopping(phase: str, done: int, total: int) -> None:
        seen.append((phase, done))
        if phase == "scoring blocks" or (phase == "writing text" and done == 40 and len(seen) == 40):
            raise StoppedError

    for first in (1, 33):
        seen_before = len(seen)
        with pytest.raises(StoppedError):
            prune(open_request(config), OutputOptions(tmp_path / "out", resume=True), RunContext(progress=stopping))
        assert seen[seen_before] == ("writing text", first)
    resumed: list[str] = []
    context = RunContext(progress=lambda phase, done, total: resumed.append(phase))
    again = prune(open_request(config), OutputOptions(tmp_path / "out", resume=True), context)
    assert "writing text" not in resumed
    assert (again.digest, again.outputs) == (whole.digest, whole.outputs)


def test_a_sweep_lets_the_model_write_once(dense: Path, text: Path, tmp_path: Path) -> None:
    config = SweepConfig.model_validate(
        {
            "model": str(dense),
            "sparsity": "0.2,0.4",
            "methods": "magnitude,random",
            "tune": "mask",
            "perplexity": {"texts": [str(text)], "window": 32, "rows": 2},
            "calibration": {"text": ["self"], "rows": 4, "length": 16},
        }
    )
    written: list[int] = []

    def heard(phase: str, done: int, total: int) -> None:
        if phase == "writing text":
            written.append(done)

    sweep(open_sweep(config), OutputOptions(tmp_path / "out"), RunContext(progress=heard))
    assert written == list(range(1, 17))
    recorded = json.loads((tmp_path / "out" / "spine.json").read_text())
    assert list(recorded["inputs"]["calibration"]["files"]) == ["self"]
