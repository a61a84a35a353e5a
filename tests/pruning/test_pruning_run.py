from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Recipe, recipe
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import cut_checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.tensors import held
from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.config import read_config
from spinecli.data.config import CalibrationConfig
from spinecli.errors import OptionError, OutputExistsError, VerificationError
from spinecli.pruning.config import PruneConfig, TuneConfig, Widths
from spinecli.pruning.decision import any_masks, planned
from spinecli.pruning.methods import METHODS
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.request import open_request
from spinecli.pruning.run import dry_run, prune
from spinecli.pruning.scoring import Scores

Written = Callable[[Recipe], Path]
LLAMA = recipe("llama", grouped=True, blocks=4)


@pytest.fixture
def options(written: Written, sample_file: Path) -> Callable[..., PruneConfig]:
    def make(made: Recipe = LLAMA, **changes: Any) -> PruneConfig:
        plain: dict[str, Any] = {
            "model": str(written(made)),
            "sparsity": 0.3,
            "calibration": CalibrationConfig(text=str(sample_file), rows=8, length=16),
        }
        return read_config(PruneConfig, None, plain | changes)

    return make


def sums(directory: Path) -> dict[str, str]:
    return {name: record.sha256 for name, record in read_manifest(directory).outputs.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_method_writes_what_it_says(
    options: Callable[..., PruneConfig], tmp_path: Path, family: str, method: str
) -> None:
    request = open_request(options(recipe(family, blocks=4), method=method, sparsity=0.25))
    manifest = prune(request, OutputOptions(tmp_path / "out"))
    cut, masks = Checkpoint.open(tmp_path / "out"), Masks.load(tmp_path / "out")
    report: dict[str, Any] = manifest.report
    assert damaged_files(tmp_path / "out", read_manifest(tmp_path / "out")) == {}
    assert cut.blocks == len(masks.kept_blocks) == 4 - len(report["removed_blocks"])
    assert cut.shape == masks.uniform_shape(request.checkpoint.shape)
    parameters = sum(torch.Size(stored.shape).numel() for name, stored in cut.tensors.items() if ".layers." in name)
    assert report["achieved_sparsity"] == pytest.approx(1 - parameters / report["dense"]["block_parameters"])
    assert abs(report["achieved_sparsity"] - 0.25) < 0.12
    assert report["achieved_sparsity"] > 0
    if method not in ("spine", "comp", "shortgpt"):
        assert report["removed_blocks"] == []
    if method == "shortgpt":
        assert cut.shape == request.checkpoint.shape
    scores = Scores.from_tensors(load_file(tmp_path / "out" / "scores.safetensors"))
    assert [len(units.channels) for units in scores.units] == [request.checkpoint.shape.channels] * 4
    assert [step.kind for step in manifest.lineage] == ["dense-checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.num_parameters() == report["cut"]["total_parameters"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_masks_that_are_written_cut_the_dense_model_to_what_is_written(
    options: Callable[..., PruneConfig], tmp_path: Path, family: str
) -> None:
    request = open_request(options(recipe(family, blocks=4), sparsity=0.4))
    report: dict[str, Any] = prune(request, OutputOptions(tmp_path / "out")).report
    found, masks = Checkpoint.open(tmp_path / "out"), Masks.load(tmp_path / "out")
    cut = cut_checkpoint(request.checkpoint, masks)
    assert found.shapes == cut.shapes
    ends = (request.checkpoint.family.attention.output, *request.checkpoint.family.feed_forward.inputs[1:])
    fitted = (*ends, request.checkpoint.family.feed_forward.output)
    kept = [name for name in cut.tensors if not any(f".{each}." in name for each in fitted)]
    assert len(kept) < len(cut.tensors)
    assert all(torch.equal(found.read(name), cut.read(name)) for name in kept)
    assert [block["channels"] for block in report["removed_by_block"]] == [
        int((~mask.channels).sum()) for mask in masks.blocks
    ]
    assert report["removed_blocks"] == masks.removed_blocks


def test_a_method_that_does_not_fit_decides_on_units_and_one_that_does_leaves_them_open(
    options: Callable[..., PruneConfig],
) -> None:
    for method, decided in (("flap", True), ("comp", True), ("spine", False)):
        request = open_request(options(method=method))
        decision = dry_run(request)
        assert (decision.candidate.masks is not None) == decided
        plan = planned(request, decision)
        assert plan.masks.shapes_after(request.checkpoint.shapes) == plan.shapes
        assert plan.masks.removed_blocks == [index for index, kept in enumerate(decision.candidate.kept) if not kept]
        if decision.candidate.masks:
            assert plan.masks is decision.candidate.masks


def test_the_plan_of_units_that_are_not_chosen_yet_has_the_size_of_the_result(
    options: Callable[..., PruneConfig], tmp_path: Path
) -> None:
    request = open_request(options())
    said = planned(request, dry_run(request)).report()
    done = prune(request, OutputOptions(tmp_path / "out")).report
    assert {key: said[key] for key in ("cut", "shapes_after", "achieved_sparsity", "removed_blocks", "engines")} == {
        key: done[key] for key in ("cut", "shapes_after", "achieved_sparsity", "removed_blocks", "engines")
    }


def test_any_masks_keep_the_first_units() -> None:
    before = (BlockShape(4, 2, 8, 5),) * 3
    after = (BlockShape(2, 1, 8, 3), BlockShape(0, 0, 8, 0), BlockShape(4, 2, 8, 5))
    masks = any_masks(before, after)
    assert masks.fit(before)
    assert masks.shapes_after(before) == (after[0], after[2])
    assert masks.blocks[0].heads.tolist() == [True, True, False, False]
    assert masks.blocks[0].channels.tolist() == [True] * 3 + [False] * 2


def test_a_search_compares_allocations_and_takes_the_best(options: Callable[..., PruneConfig]) -> None:
    request = open_request(options(recipe("llama", blocks=6), sparsity=0.4))
    decision = dry_run(request)
    found = [each.held_out for each in decision.scored]
    assert len(found) > 2
    best = decision.scored[found.index(min(found))].allocation
    plan = planned(request, decision)
    assert set(plan.shapes) == {best.shape}
    assert best.removed_blocks == len(plan.masks.removed_blocks)


def test_a_named_share_is_not_searched(options: Callable[..., PruneConfig]) -> None:
    decision = dry_run(open_request(options(block_share=0.0)))
    assert decision.scored == ()
    assert all(decision.candidate.kept)


def test_protected_blocks_stay(options: Callable[..., PruneConfig]) -> None:
    chosen = options(method="shortgpt", sparsity=0.5, protect=(0, 1))
    assert dry_run(open_request(chosen)).candidate.kept == [True, True, False, False]
    chosen = options(method="shortgpt", sparsity=0.5, protect=(-1, -2))
    assert dry_run(open_request(chosen)).candidate.kept == [False, False, True, True]


def test_the_same_command_gives_the_same_bytes_and_digest(options: Callable[..., PruneConfig], tmp_path: Path) -> None:
    manifests = [prune(open_request(options()), OutputOptions(tmp_path / name)) for name in ("one", "two")]
    assert manifests[0].digest == manifests[1].digest
    assert sums(tmp_path / "one") == sums(tmp_path / "two")


class Killed(BaseException):
    pass


def test_a_run_killed_anywhere_resumes_to_the_same_bytes(
    options: Callable[..., PruneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.artifacts.journal.PassJournal", partial(PassJournal, share=float("inf")))
    prune(open_request(options()), OutputOptions(tmp_path / "whole"))
    seen: list[tuple[str, int]] = []

    def kill_at_new(phase: str, done: int, total: int) -> None:
        if (phase, done) not in seen:
            seen.append((phase, done))
            raise Killed

    for _ in range(40):
        try:
            prune(
                open_request(options()), OutputOptions(tmp_path / "out", resume=True), RunContext(progress=kill_at_new)
            )
            break
        except Killed:
            assert not (tmp_path / "out").exists()
    assert len({phase for phase, _ in seen}) >= 3
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert read_manifest(tmp_path / "out").digest == read_manifest(tmp_path / "whole").digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_finished_run_is_not_repeated(options: Callable[..., PruneConfig], tmp_path: Path) -> None:
    first = prune(open_request(options(block_share=0.0)), OutputOptions(tmp_path / "out"))
    again = prune(open_request(options(block_share=0.0)), OutputOptions(tmp_path / "out", resume=True))
    assert again.measured.started == first.measured.started
    with pytest.raises(OutputExistsError):
        prune(open_request(options(block_share=0.5)), OutputOptions(tmp_path / "out", resume=True))


def test_pruning_a_pruned_checkpoint_lengthens_the_lineage(options: Callable[..., PruneConfig], tmp_path: Path) -> None:
    prune(open_request(options(block_share=0.0)), OutputOptions(tmp_path / "one"))
    again = options(block_share=0.0, model=str(tmp_path / "one"))
    manifest = prune(open_request(again), OutputOptions(tmp_path / "two"))
    assert [step.kind for step in manifest.lineage] == ["dense-checkpoint", "pruned-checkpoint"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sparsity": 0.0}, "--sparsity"),
        ({"sparsity": 1.0}, "--sparsity"),
        ({"sparsity": float("nan")}, "--sparsity"),
        ({"method": "sorcery"}, "choose one of spine"),
        ({"method": "comp", "metric": "m9"}, "choose one of m0"),
        ({"block_share": 1.5}, "--block-share"),
        ({"round_to": 0}, "--round-to"),
        ({"protect": (9,)}, "--protect names block 9"),
        ({"calibration": CalibrationConfig(rows=2, length=16)}, "needs at least 4, not 2"),
        ({"calibration": CalibrationConfig(rows=2, length=999)}, "--calibration-length 999"),
    ],
    ids=str,
)
def test_wrong_options_are_told_before_any_work(
    options: Callable[..., PruneConfig], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        open_request(options(**change))


@pytest.mark.parametrize("option", [{"metric": "m1"}, {"block_share": 0.5}, {"widths": Widths.adaptive}], ids=str)
def test_a_baseline_refuses_what_only_others_can_choose(
    options: Callable[..., PruneConfig], option: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="belongs to --method"):
        open_request(options(method="flap", **option))


def test_a_cut_that_removes_nothing_is_refused(options: Callable[..., PruneConfig]) -> None:
    with pytest.raises(OptionError, match="smallest unit"):
        dry_run(open_request(options(sparsity=0.001, block_share=0.0)))


def test_the_report_is_plain_json(options: Callable[..., PruneConfig]) -> None:
    report = dry_run(open_request(options(block_share=0.0))).report()
    assert json.loads(json.dumps(report)) == report


# Of six blocks one sees everything, and it is none of those that are protected by default.
ONE_GLOBAL = recipe(
    "gemma3_text",
    blocks=6,
    grouped=True,
    extra=(("layer_types", (*("sliding_attention",) * 2, "full_attention", *("sliding_attention",) * 3)),),
)


@pytest.mark.parametrize("method", ["shortgpt", "comp"])
def test_the_only_block_of_its_kind_stays_and_the_plan_says_so(
    options: Callable[..., PruneConfig], method: str
) -> None:
    share = "auto" if method == "shortgpt" else 1.0
    request = open_request(options(ONE_GLOBAL, method=method, sparsity=0.5, protect=(), block_share=share))
    decision = dry_run(request)
    assert decision.candidate.kept[2]
    assert decision.report()["kept_for_their_kind"]["2"] == "full_attention"
    assert len(decision.report()["kept_for_their_kind"]) == 2


def test_no_sparsity_takes_the_last_block_of_a_kind(options: Callable[..., PruneConfig]) -> None:
    request = open_request(options(ONE_GLOBAL, method="shortgpt", sparsity=0.9, protect=()))
    with pytest.raises(OptionError, match="only 4 may be removed"):
        dry_run(request)


def test_rows_that_are_shorter_than_a_window_are_said(
    options: Callable[..., PruneConfig], caplog: pytest.LogCaptureFixture
) -> None:
    wide = replace(ONE_GLOBAL, extra=(*ONE_GLOBAL.extra, ("sliding_window", 32)))
    open_request(options(wide, method="magnitude"))
    assert "shorter than the sliding window of 32" in caplog.text


def test_rows_begin_as_the_tokenizer_begins_a_text_unless_told_otherwise(
    options: Callable[..., PruneConfig], tmp_path: Path
) -> None:
    model = shutil.copytree(options().model, tmp_path / "begun")
    made = load_tokenizer(model)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save_pretrained(model)
    begun = options(model=str(model), method="magnitude")
    request = open_request(begun)
    assert request.calibration.read().tokens[:, 0].tolist() == [1] * 8
    assert str(request.calibration.frame) == "each opened by <s>"
    manifest = prune(request, OutputOptions(tmp_path / "out"))
    assert manifest.parameters["special_tokens"] == "auto"
    tuned = open_tune(TuneConfig(pruned=tmp_path / "out"))
    assert torch.equal(tuned.calibration.read().tokens, request.calibration.read().tokens)
    plain = read_config(PruneConfig, None, begun.model_dump() | {"special_tokens": "none"})
    text = made(Path((begun.calibration.text or ("",))[0]).read_text(), add_special_tokens=False)["input_ids"]
    assert open_request(plain).calibration.read().tokens[0].tolist() == text[:16]


def test_a_model_that_spine_reads_otherwise_than_transformers_is_not_pruned(
    options: Callable[..., PruneConfig], tmp_path: Path
) -> None:
    request = open_request(options(method="magnitude"))
    name = "model.layers.0.mlp.down_proj.weight"
    wrong = held(request.checkpoint.read(name) + 0.5)
    misread = replace(request.checkpoint, tensors={**request.checkpoint.tensors, name: wrong})
    request = replace(request, checkpoint=misread)
    with pytest.raises(VerificationError, match="differently from transformers"):
        prune(request, OutputOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
