from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Recipe, recipe
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.checkpoints.cut_picture import BlockCut, CutPicture, DrawnRecovery, block_cuts, cuts_of
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.data.config import CalibrationConfig
from spinecli.errors import ForeignArtifactError
from spinecli.pruning.config import PruneConfig, TuneConfig
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

LLAMA = recipe("llama", grouped=True, blocks=4)


@pytest.fixture(scope="module")
def pruned(
    written: Callable[[Recipe], Path], sample_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A checkpoint cut by a method, once a module."""
    made: dict[str, Path] = {}

    def cut(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("cuts") / method
            calibration = CalibrationConfig(text=str(sample_file), rows=8, length=16)
            options = PruneConfig(model=str(written(LLAMA)), sparsity=0.4, method=method, calibration=calibration)
            prune(open_prune(options), OutputOptions(made[method]))
        return made[method]

    return cut


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_a_block_keeps_what_its_masks_say() -> None:
    def bits(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.bool)

    masks = Masks((BlockMask(bits(1, 0), bits(1, 1, 0)), BlockMask(bits(0, 0), bits(0, 0, 0))))
    assert block_cuts(masks) == (BlockCut(1, 2, 2, 3), BlockCut(0, 2, 0, 3))
    assert [cut.removed for cut in block_cuts(masks)] == [False, True]


def test_a_bare_cut_has_no_recovery(pruned: Callable[[str], Path]) -> None:
    assert cuts_of(pruned("flap")).recovered == ()


@pytest.mark.parametrize("kept", ["tuned", "untuned"])
def test_a_refit_and_a_tuning_tell_what_they_did(pruned: Callable[[str], Path], tmp_path: Path, kept: str) -> None:
    tune(open_tune(TuneConfig(pruned=pruned("flap"))), OutputOptions(tmp_path / "tuned"))
    shutil.copytree(pruned("spine"), tmp_path / "refit")
    for directory, part in ((tmp_path / "refit", "refit"), (tmp_path / "tuned", None)):
        manifest = read_manifest(directory)
        outer: Any = dict(manifest.report)
        report = outer[part] if part else outer
        report["kept"] = kept
        manifest.model_copy(update={"report": outer}).sealed().write(directory)
        found = cuts_of(directory).recovered
        told = [(layer["layer"], layer["error_before"], layer["error_after"]) for layer in report["layers"]]
        assert len(told) >= 2
        assert [(layer.layer, layer.error_before, layer.error_after) for layer in found] == (
            told if kept == "tuned" else []
        )
        assert {layer["dense_block"] for layer in report["layers"]} == set(Masks.load(directory).kept_blocks)


def test_a_checkpoint_that_was_never_cut_is_refused(written: Callable[[Recipe], Path]) -> None:
    with pytest.raises(ForeignArtifactError, match="does not say what was cut"):
        cuts_of(written(LLAMA))


def test_the_picture_is_drawn_where_the_user_says(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    directory = pruned("spine")
    first = invoke(directory, "--plot", tmp_path / "cut.png", "--json")
    assert first.exit_code == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["picture"] == str(tmp_path / "cut.png")
    assert told["kept"] == [asdict(cut) for cut in cuts_of(directory).blocks]
    drawn = (tmp_path / "cut.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.png"]
    assert damaged_files(directory, read_manifest(directory)) == {}
    refused = invoke(directory, "--plot", tmp_path / "cut.png")
    assert (refused.exit_code, "add --overwrite" in refused.stderr) == (2, True)
    again = invoke(directory, "--plot", tmp_path / "cut.png", "--overwrite")
    assert again.exit_code == 0
    assert (tmp_path / "cut.png").read_bytes() == drawn


def test_a_directory_without_masks_gets_no_picture(written: Callable[[Recipe], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = invoke(written(LLAMA), "--plot", tmp_path / "cut.png")
    assert result.exit_code == 2
    assert "masks.safetensors" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_told_in_one_sentence(
    pruned: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.artifacts.picture_file.find_spec", lambda name: None)
    result = invoke(pruned("flap"), "--plot", tmp_path / "cut.png")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --plot needs matplotlib")
    assert invoke(pruned("flap")).exit_code == 0


@pytest.mark.parametrize("blocks", [1, 40])
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_any_number_of_blocks_can_be_drawn(tmp_path: Path, blocks: int, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    from spinecli.checkpoints.cut_picture import save_cut_picture

    cut = tuple(BlockCut(0 if index % 3 else 4, 4, index, 40) for index in range(blocks))
    layers = tuple(DrawnRecovery(index, "mlp", 0.5, 0.25) for index in range(blocks))
    for number, recovered in enumerate(((), layers)):
        path = tmp_path / f"{number}{suffix}"
        save_cut_picture(CutPicture(cut, recovered), "a title", path)
        begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
        assert path.read_bytes().startswith(begins[suffix])
        if suffix == ".svg":
            assert path.read_text().count("<path") > blocks
