"""`spine prune` and `spine tune` on encoders and classifiers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LABELS, Recipe, answers, classifier, load, random_tokens, recipe
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import Heads
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.config import read_config
from spinecli.data.config import CalibrationConfig
from spinecli.errors import OptionError
from spinecli.pruning.config import PruneConfig, TuneConfig
from spinecli.pruning.decision import planned
from spinecli.pruning.methods import METHODS
from spinecli.pruning.recovery.recover import RecoveryOutcome
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request
from spinecli.pruning.run import dry_run, prune

Written = Callable[[Recipe], Path]
TOKENS = random_tokens(2, 16)
REAL = Path(__file__).parents[3] / "shared" / "models" / "minilm-L6"
BERT = classifier("bert", blocks=4)


@pytest.fixture
def options(written: Written, sample_file: Path) -> Callable[..., PruneConfig]:
    def make(made: Recipe = BERT, **changes: Any) -> PruneConfig:
        plain: dict[str, Any] = {
            "model": str(written(made)),
            "sparsity": 0.3,
            "method": "comp",
            "metric": "m0",
            "calibration": CalibrationConfig(text=str(sample_file), rows=8, length=16),
        }
        return read_config(PruneConfig, None, plain | changes)

    return make


@pytest.mark.parametrize("heads", [Heads.auto, Heads.cut], ids=["plain", "narrow"])
@pytest.mark.parametrize("task", ["classification", "masked-lm", "encoding"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_pruned_and_tuned(
    options: Callable[..., PruneConfig], tmp_path: Path, family: str, task: str, heads: Heads
) -> None:
    request = open_request(options(recipe(family, task=task, blocks=4), heads=heads, block_share=0.5, sparsity=0.4))
    manifest = prune(request, OutputOptions(tmp_path / "pruned"))
    report: dict[str, Any] = manifest.report
    cut, masks = Checkpoint.open(tmp_path / "pruned"), Masks.load(tmp_path / "pruned")
    assert damaged_files(tmp_path / "pruned", read_manifest(tmp_path / "pruned")) == {}
    assert cut.family.model_type == report["model_type"] == ("narrow_" if heads is Heads.cut else "") + family
    assert cut.task is request.checkpoint.task
    assert (cut.shape.heads < 4) == (heads is Heads.cut)
    assert cut.shape.channels < 40
    assert cut.blocks == len(masks.kept_blocks) == 3
    assert abs(report["achieved_sparsity"] - 0.4) < 0.12
    assert sum(value.numel() for value in load(cut.path).parameters()) == report["cut"]["total_parameters"]

    manifest = tune(open_tune(TuneConfig(pruned=tmp_path / "pruned")), OutputOptions(tmp_path / "tuned"))
    assert manifest.report["judged_by"] == "distance to the dense model's output"
    assert 0 < manifest.report["held_out_after"] < manifest.report["held_out_before"]  # type: ignore[operator]
    assert Checkpoint.open(tmp_path / "tuned").shape == cut.shape
    dense, before, after = (streamed_logits(each, TOKENS) for each in (request.checkpoint, cut, _open(tmp_path)))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(answers(load(tmp_path / "tuned"), TOKENS), after, atol=1e-4, rtol=0)
    assert dense.shape == after.shape


def _open(directory: Path) -> Checkpoint:
    return Checkpoint.open(directory / "tuned")


@pytest.mark.parametrize("made", [BERT, classifier("llama", grouped=True, blocks=4)], ids=lambda made: made.family)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_cuts_a_classifier(
    options: Callable[..., PruneConfig], tmp_path: Path, made: Recipe, method: str
) -> None:
    metric = "m4" if method == "comp" else None
    prune(open_request(options(made, method=method, metric=metric)), OutputOptions(tmp_path / "out"))
    assert answers(load(tmp_path / "out"), TOKENS).shape == (2, LABELS)


def test_allocations_of_an_encoder_are_compared_by_distance(options: Callable[..., PruneConfig]) -> None:
    request = open_request(options(recipe("bert", blocks=6), sparsity=0.4, heads=Heads.cut))
    decision = dry_run(request)
    report: dict[str, Any] = decision.report()
    assert report["compared_by"] == "distance to the dense model's output"
    distances = [judged["held_out"] for judged in report["compared"]]
    assert len(distances) > 2
    assert all(0 < distance < 2 for distance in distances)
    best = report["compared"][distances.index(min(distances))]
    kept = [asdict(shape) for shape in planned(request, decision).shapes]
    assert kept == [best["shape"]] * (6 - best["removed_blocks"])
    assert len({judged["shape"]["heads"] for judged in report["compared"]}) > 1


def test_an_uncut_encoder_is_at_no_distance(options: Callable[..., PruneConfig]) -> None:
    from spinecli.checkpoints.stream.block_stream import BlockStream
    from spinecli.pruning.allocation import Allocation
    from spinecli.pruning.search import Candidate, score_candidates

    checkpoint = open_request(options()).checkpoint
    whole = Candidate(Allocation(0, checkpoint.shape, 0.0), checkpoint.shapes, Masks.full(checkpoint.shapes))
    [judged] = score_candidates(BlockStream(checkpoint, 16), random_tokens(8, 16), [whole], "comparing")
    assert judged.held_out == pytest.approx(0, abs=1e-6)


def test_the_choice_of_heads_decides_what_may_leave(options: Callable[..., PruneConfig]) -> None:
    assert set(open_request(options()).budget.kv_heads) == {4}
    assert set(open_request(options(heads=Heads.cut)).budget.kv_heads) == {4, 3, 2, 1}
    llama = recipe("llama", blocks=4)
    assert len(open_request(options(llama)).budget.kv_heads) == 4
    assert open_request(options(llama, heads=Heads.keep)).budget.kv_heads == (4,)
    with pytest.raises(OptionError, match="--heads cut is not possible with opt"):
        open_request(options(recipe("opt", blocks=4), heads=Heads.cut))
    with pytest.raises(OptionError, match="--heads must be one of auto, cut, keep"):
        read_config(PruneConfig, None, {"model": "m", "sparsity": 0.3, "heads": "some"})


class Killed(BaseException):
    pass


def test_a_killed_run_on_an_encoder_resumes_to_the_same_bytes(
    options: Callable[..., PruneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.artifacts.journal.PassJournal", partial(PassJournal, share=float("inf")))
    monkeypatch.setattr(RecoveryOutcome, "helps", property(lambda _: True))
    chosen = options(heads=Heads.cut)

    def prune_to(out: Path, context: RunContext | None = None) -> None:
        prune(open_request(chosen), OutputOptions(out, resume=True), context)

    def tune_to(out: Path, context: RunContext | None = None) -> None:
        tune(open_tune(TuneConfig(pruned=tmp_path / "pruned")), OutputOptions(out, resume=True), context)

    prune_to(tmp_path / "pruned")
    for step in (prune_to, tune_to):
        whole, killed = tmp_path / f"whole {step.__name__}", tmp_path / f"killed {step.__name__}"
        step(whole)
        seen: list[tuple[str, int]] = []

        def kill_at_new(phase: str, done: int, total: int, seen: list[tuple[str, int]] = seen) -> None:
            if (phase, done) not in seen:
                seen.append((phase, done))
                raise Killed

        while not killed.exists():
            try:
                step(killed, RunContext(progress=kill_at_new))
            except Killed:
                assert not killed.exists()
        assert len(seen) >= 5
        assert read_manifest(killed).digest == read_manifest(whole).digest


@pytest.mark.parametrize("heads", ["auto", "cut"])
def test_the_commands_work_on_a_classifier(
    written: Written, sample_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: str
) -> None:
    monkeypatch.chdir(tmp_path)
    prune_command = f"prune {written(BERT)} --sparsity 0.3 --heads {heads} --calibration {sample_file} --out pruned"
    rows = "--calibration-rows 8 --calibration-length 16"
    said = _run(f"{prune_command} {rows}")
    assert "compared by the distance to the dense model's output" in said
    assert "allocations compared by the distance to the dense model's output, after a recovery" in said
    said = _run("tune pruned --out tuned")
    assert "distance to the dense model's output, on held-out rows" in said
    assert "perplexity" not in said
    found = json.loads(_run("inspect tuned --verify --json"))
    assert found["task"] == "classification"
    assert found["damaged"] == {}
    assert len(found["blocks"]) == json.loads((tmp_path / "tuned" / "config.json").read_text())["num_hidden_layers"]
    assert answers(load(tmp_path / "tuned"), TOKENS).shape == (2, LABELS)


def _run(command: str) -> str:
    done = CliRunner().invoke(app, command.split(), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real checkpoints are not here")
def test_a_real_encoder_loses_a_fifth_of_its_block_parameters(tmp_path: Path) -> None:
    calibration = CalibrationConfig(text="builtin:python-docs", rows=16, length=64)
    chosen = PruneConfig(
        model=str(REAL), sparsity=0.2, block_share=0.0, method="comp", metric="m1", calibration=calibration
    )
    manifest = prune(open_request(chosen), OutputOptions(tmp_path / "pruned"))
    assert manifest.report["achieved_sparsity"] == pytest.approx(0.2, abs=0.005)
    assert manifest.report["largest_logit_difference"] < 1e-4  # type: ignore[operator]
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert (pruned.shape.heads, pruned.blocks, pruned.storage_dtype) == (12, 6, torch.float16)
    request = open_tune(TuneConfig(pruned=tmp_path / "pruned"))
    assert request.calibration.read().tokens[0, [0, -1]].tolist() == [101, 102]
    report: dict[str, Any] = tune(request, OutputOptions(tmp_path / "tuned")).report
    assert report["held_out_after"] < 0.6 * report["held_out_before"]
