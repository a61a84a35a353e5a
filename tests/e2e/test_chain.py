"""prune, tune and inspect behind one another, as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from spine_process import Here, Step, run_step, spine
from sums import contents
from tiny_llama import BLOCKS


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class TestPrune:
    def test_json_is_one_object_on_stdout(self, pruned: Step) -> None:
        value = pruned.finished.json
        assert value["out"] == str(pruned.out)
        assert value["measured"]["seconds"]["total"] > 0

    def test_notes_go_to_stderr(self, pruned: Step) -> None:
        assert pruned.finished.stderr.startswith("calibrating on 16 rows of 32 tokens")

    def test_sparsity_is_what_was_asked(self, pruned: Step) -> None:
        value = pruned.finished.json
        assert value["achieved_sparsity"] == pytest.approx(0.4, abs=0.02)
        assert value["cut"]["block_parameters"] == round(
            value["dense"]["block_parameters"] * (1 - value["achieved_sparsity"])
        )

    def test_files_hold_what_the_report_says(self, pruned: Step) -> None:
        value = pruned.finished.json
        weights = load_file(pruned.out / "model.safetensors")
        in_blocks = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("model.layers."))
        assert in_blocks == value["cut"]["block_parameters"]
        assert json.loads((pruned.out / "config.json").read_text())["num_hidden_layers"] == BLOCKS - len(
            value["removed_blocks"]
        )

    def test_files_are_readable_by_whom_the_umask_lets(self, pruned: Step) -> None:
        modes = {path.name: path.stat().st_mode & 0o777 for path in pruned.out.iterdir()}
        assert len(set(modes.values())) == 1, modes

    def test_no_work_is_left_behind(self, pruned: Step, tuned: Step) -> None:
        assert leftovers(pruned.out.parent) == []

    @pytest.mark.slow
    def test_the_same_command_writes_the_same_bytes(self, pruned: Step, tmp_path: Path) -> None:
        assert run_step(tmp_path / "again", *pruned.arguments).contents == pruned.contents

    def test_dry_run_writes_nothing(self, dense: Path, text: Path, tmp_path: Path, spine_here: Here) -> None:
        calibration = ("--calibration", text, "--calibration-rows", 8, "--calibration-length", 16)
        done = spine_here(
            "prune", dense, "--sparsity", 0.4, *calibration, "--dry-run", "--out", tmp_path / "out", "--json"
        )
        assert done.code == 0
        assert done.json["out"] is None
        assert {abs(cut["achieved_sparsity"] - 0.4) < 0.02 for cut in done.json["possible"]} == {True}
        assert done.json["predicted_seconds"] > 0
        assert list(tmp_path.iterdir()) == []

    def test_a_scored_dry_run_has_the_size_of_the_result(self, pruned: Step, tmp_path: Path, spine_here: Here) -> None:
        done = spine_here(*pruned.arguments, "--dry-run", "--score", "--json")
        assert {key: done.json[key] for key in ("achieved_sparsity", "cut", "shapes_after")} == {
            key: pruned.finished.json[key] for key in ("achieved_sparsity", "cut", "shapes_after")
        }


class TestOutput:
    def test_existing_output_is_refused(self, pruned: Step, spine_here: Here) -> None:
        before = pruned.contents
        done = spine_here(*pruned.arguments, "--out", pruned.out)
        assert done.code == 2
        assert "--overwrite" in done.stderr
        assert pruned.contents == before

    def test_overwrite_replaces_it(self, pruned: Step, dense: Path, tmp_path: Path, spine_here: Here) -> None:
        out = tmp_path / "out"
        first = spine_here(*pruned.arguments, "--sparsity", 0.2, "--out", out)
        second = spine_here(*pruned.arguments, "--out", out, "--overwrite")
        assert (first.code, second.code) == (0, 0)
        assert contents(out) == pruned.contents
        assert leftovers(tmp_path) == []

    def test_a_foreign_directory_stays_even_with_overwrite(
        self, pruned: Step, tmp_path: Path, spine_here: Here
    ) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        done = spine_here(*pruned.arguments, "--out", tmp_path, "--overwrite")
        assert done.code == 2
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_an_output_named_by_dots_is_the_directory_meant(
        self, pruned: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spine_here: Here
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        done = spine_here(*pruned.arguments, "--out", ".")
        assert done.code == 0
        assert contents(tmp_path / "here") == pruned.contents

    def test_a_linked_output_is_replaced_where_it_lies(self, pruned: Step, tmp_path: Path, spine_here: Here) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "disk")
        done = spine_here(*pruned.arguments, "--out", tmp_path / "out")
        assert done.code == 0
        assert (tmp_path / "out").is_symlink()
        assert contents(tmp_path / "disk") == pruned.contents


class TestTune:
    def test_results_on_stdout_and_notes_on_stderr(self, tuned: Step) -> None:
        assert "KL divergence from the dense model's next token, in nats, on held-out rows" in tuned.finished.stdout
        assert tuned.finished.stderr.startswith("tuning on 14 rows of 32 tokens")

    def test_the_shape_stays(self, pruned: Step, tuned: Step) -> None:
        assert (tuned.out / "config.json").read_bytes() == (pruned.out / "config.json").read_bytes()

    def test_the_held_out_divergence_falls(self, tuned: Step) -> None:
        report = json.loads((tuned.out / "spine.json").read_text())["report"]
        assert report["kept"] == "tuned"
        assert report["held_out_after"] < report["held_out_before"]

    @pytest.mark.slow
    def test_the_same_command_writes_the_same_bytes_and_quiet_is_silent(self, tuned: Step, tmp_path: Path) -> None:
        again = run_step(tmp_path / "again", *tuned.arguments, "--quiet")
        assert again.contents == tuned.contents
        assert again.finished.stderr == ""

    def test_a_tuned_directory_is_not_tuned_again(self, tuned: Step, tmp_path: Path, spine_here: Here) -> None:
        done = spine_here("tune", tuned.out, "--out", tmp_path / "twice")
        assert done.code == 2
        assert done.stderr.splitlines() == [
            f"error: {tuned.out} is a tuned-checkpoint, not a pruned-checkpoint; "
            "name the directory that spine prune wrote."
        ]
        assert list(tmp_path.iterdir()) == []


class TestInspect:
    def test_verify_finds_every_sum_right(self, tuned: Step) -> None:
        done = spine("inspect", tuned.out, "--verify")
        assert done.code == 0
        assert "all sums agree" in done.stdout

    def test_lineage_reaches_the_dense_model(
        self, dense: Path, pruned: Step, tuned: Step, spine_here: Here, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = spine_here("inspect", tuned.out, "--json").json["manifest"]
        steps = [(step["kind"], step["reference"]) for step in manifest["lineage"]]
        assert steps == [("dense-checkpoint", str(dense)), ("pruned-checkpoint", str(pruned.out))]
        monkeypatch.setenv("COLUMNS", "250")
        shown = spine_here("inspect", tuned.out).stdout
        for name in ("dense-checkpoint", "pruned-checkpoint", "tuned-checkpoint", str(dense), str(pruned.out)):
            assert name in shown

    def test_a_changed_byte_is_found(self, tuned: Step, tmp_path: Path, spine_here: Here) -> None:
        copy = shutil.copytree(tuned.out, tmp_path / "copy")
        weights = copy / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        done = spine_here("inspect", copy, "--verify", "--json")
        assert done.code == 1
        assert done.json["damaged"] == {"model.safetensors": "changed"}

    def test_a_checkpoint_that_spine_did_not_write_has_blocks_too(self, dense: Path, spine_here: Here) -> None:
        assert len(spine_here("inspect", dense, "--json").json["blocks"]) == BLOCKS
