from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MIXED_WINDOWS, VARIANTS, Recipe, random_tokens, recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream, ComputeOptions
from spinecli.checkpoints.stream.objective import DIVERGENCE, OUTPUT_DISTANCE, Objective
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.config import read_config
from spinecli.data.config import CalibrationConfig
from spinecli.errors import DamagedArtifactError, ForeignArtifactError, MissingPathError, OptionError
from spinecli.pruning.config import PruneConfig, TuneConfig, TuneMethod
from spinecli.pruning.recovery.block import Fit, projections
from spinecli.pruning.recovery.recover import (
    SCALES_NAME,
    RecoveryOutcome,
    RecoveryTask,
    TunedWeights,
    recover_student,
    split_rows,
    tuned_checkpoint,
)
from spinecli.pruning.recovery.tune import TuneRequest, open_request, tune
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

Written = Callable[[Recipe], Path]
Pruned = Callable[..., Path]
LLAMA = recipe("llama", grouped=True, blocks=4)


@pytest.fixture(scope="session")
def pruned(written: Written, sample_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """A pruned checkpoint, made once per recipe and share. Tests must not change it."""
    made: dict[Any, Path] = {}

    def make(chosen: Recipe = LLAMA, block_share: float = 0.5) -> Path:
        if (chosen, block_share) not in made:
            out = tmp_path_factory.mktemp("pruned") / "out"
            calibration = CalibrationConfig(text=str(sample_file), rows=24, length=16)
            options = PruneConfig(
                model=str(written(chosen)),
                sparsity=0.4,
                method="comp",
                metric="m0",
                block_share=block_share,
                calibration=calibration,
            )
            prune(open_prune(options), OutputOptions(out))
            made[chosen, block_share] = out
        return made[chosen, block_share]

    return make


def request_of(directory: Path, method: TuneMethod = TuneMethod.auto, **changes: Any) -> TuneRequest:
    return open_request(read_config(TuneConfig, None, {"pruned": directory, "method": method, **changes}))


def layers(outcome_of: TunedWeights, blocks: int) -> list[dict[str, Any]]:
    return [layer for index in range(blocks) for layer in outcome_of.report(index)]  # type: ignore[misc]


@pytest.mark.parametrize(
    "chosen",
    [
        LLAMA,
        recipe("opt", blocks=4),
        replace(VARIANTS["opt post-norm"], blocks=4),
        recipe("qwen2", grouped=True, blocks=4, extra=MIXED_WINDOWS, dtype="bfloat16"),
        replace(VARIANTS["llama biases"], blocks=4),
        recipe("gemma2", grouped=True, blocks=4),
        recipe("olmo2", blocks=4),
        recipe("phi3", grouped=True, blocks=4),
        recipe("gpt2", blocks=4, dtype="bfloat16"),
        recipe("gpt_neox", blocks=4),
    ],
    ids=lambda chosen: f"{chosen.family}{'+' if chosen.extra else ''}",
)
def test_tuning_improves_every_layer_on_held_out_rows(pruned: Pruned, tmp_path: Path, chosen: Recipe) -> None:
    request = request_of(pruned(chosen))
    tuned = TunedWeights(tmp_path)
    outcome = recover_student(request.task(request.calibration.read()), tuned)
    found = layers(tuned, request.student.blocks)
    outputs = [layer for layer in found if layer["layer"] in projections(request.student.family)]
    assert len(outputs) == 2 * request.student.blocks
    assert all(layer["error_after"] <= layer["error_before"] for layer in found)
    hurt = [layer for layer in found if layer["error_before"] > 1e-4]
    gained = [layer for layer in hurt if layer["error_after"] < layer["error_before"]]
    assert len(gained) >= len(hurt) / 2 >= 1
    assert (outcome.before > 0).all()


@pytest.mark.parametrize(
    "chosen",
    [
        LLAMA,
        recipe("opt", blocks=4),
        recipe("llama", blocks=6),
        recipe("gpt2", blocks=4),
        recipe("gemma3_text", blocks=4),
    ],
    ids=lambda r: r.family,
)
def test_tuning_brings_the_logits_nearer_to_the_dense_ones(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Recipe
) -> None:
    monkeypatch.setattr(RecoveryOutcome, "helps", property(lambda _: True))
    request = request_of(pruned(chosen), TuneMethod.lsq)
    tune(request, OutputOptions(tmp_path / "out"))
    task = request.task(request.calibration.read())
    held_out = task.tokens[task.fit.judging]
    dense, before, after = (
        streamed_logits(checkpoint, held_out)
        for checkpoint in (request.teacher, request.student, Checkpoint.open(tmp_path / "out"))
    )
    assert (after - dense).square().mean() < 0.98 * (before - dense).square().mean()


def test_gaps_are_taken_over_by_the_block_before_them(pruned: Pruned, tmp_path: Path) -> None:
    request = request_of(pruned(recipe("llama", blocks=6), 1.0), TuneMethod.lsq)
    [before, *_] = request.masks.removed_blocks
    tuned = TunedWeights(tmp_path)
    recover_student(request.task(request.calibration.read()), tuned)
    index = request.masks.kept_blocks.index(before - 1)
    [_, feed_forward] = tuned.report(index)
    assert feed_forward["error_before"] > 0.01  # type: ignore[index, call-overload]
    assert feed_forward["error_after"] < feed_forward["error_before"]  # type: ignore[index, call-overload]


@pytest.mark.parametrize("method", TuneMethod)
def test_a_tuned_checkpoint_is_whole_and_as_large_as_the_pruned_one(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: TuneMethod
) -> None:
    monkeypatch.setattr(RecoveryOutcome, "helps", property(lambda _: True))  # a random model may not gain as a whole
    source = pruned()
    manifest = tune(request_of(source, method), OutputOptions(tmp_path / "out"))
    assert damaged_files(tmp_path / "out", read_manifest(tmp_path / "out")) == {}
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert after.shape == before.shape
    changed = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    assert changed
    ends = ("o_proj.weight", "down_proj.weight", *(["up_proj.weight"] if method is TuneMethod.auto else []))
    assert all(name.endswith(ends) for name in changed)
    added = set(after.tensors) - set(before.tensors)
    assert bool(added) == (method is TuneMethod.mask_bias)
    assert all(name.endswith(".bias") for name in added)
    _, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    assert [step.kind for step in manifest.lineage] == ["dense-checkpoint", "pruned-checkpoint"]
    assert (tmp_path / "out" / "masks.safetensors").read_bytes() == (source / "masks.safetensors").read_bytes()


def test_folded_weights_equal_the_scales_applied_to_the_student(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecoveryOutcome, "helps", property(lambda _: True))
    request = request_of(pruned(), TuneMethod.mask)
    tune(request, OutputOptions(tmp_path / "out"))
    scales = load_file(tmp_path / "out" / SCALES_NAME)
    assert scales
    student = AutoModelForCausalLM.from_pretrained(request.student.path, dtype=torch.float32).eval()
    for name, factor in scales.items():
        _, index, projection = name.split(".", 2)
        student.model.layers[int(index)].get_submodule(projection).register_forward_pre_hook(
            lambda _, inputs, factor=factor: (inputs[0] * factor,)
        )
    tokens = request.calibration.read().tokens[:2]
    with torch.no_grad():
        expected = student(tokens, use_cache=False).logits
    found = streamed_logits(Checkpoint.open(tmp_path / "out"), tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_reported_logits_are_those_of_the_written_model(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecoveryOutcome, "helps", property(lambda _: True))
    chosen = recipe("qwen3", grouped=True, blocks=4, dtype="bfloat16")
    manifest = tune(request_of(pruned(chosen)), OutputOptions(tmp_path / "out"))
    assert manifest.report["largest_logit_difference"] < 1e-3  # type: ignore[operator]
    assert Checkpoint.open(tmp_path / "out").storage_dtype is torch.bfloat16


def test_a_model_that_got_worse_as_a_whole_is_left_as_it_was(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecoveryOutcome, "helps", property(lambda _: False))
    request = request_of(pruned(), TuneMethod.mask_bias)
    manifest = tune(request, OutputOptions(tmp_path / "out"))
    assert manifest.report["kept"] == "untuned"
    written = Checkpoint.open(tmp_path / "out")
    assert set(written.tensors) == set(request.student.tensors)
    assert all(torch.equal(written.read(name), request.student.read(name)) for name in written.tensors)
    assert not (tmp_path / "out" / SCALES_NAME).exists()


def test_an_outcome_helps_only_if_the_mean_over_the_judging_rows_falls(pruned: Pruned) -> None:
    request = request_of(pruned())

    def outcome(objective: Objective, before: list[float], after: list[float]) -> RecoveryOutcome:
        found = (torch.tensor(each, dtype=torch.float64) for each in (before, after))
        return RecoveryOutcome(objective, *found, request.student, request.masks, torch.empty(0))

    better = outcome(DIVERGENCE, [2.0, 1.0], [2.1, 0.8])
    assert better.helps
    assert better.report() == {
        "judged_by": DIVERGENCE.name,
        "held_out_before": pytest.approx(1.5),
        "held_out_after": pytest.approx(1.45),
        "kept": "tuned",
    }
    assert better.summary == "held-out divergence 1.5000 to 1.4500"
    same = outcome(DIVERGENCE, [2.0, 1.0], [1.0, 2.0])
    assert not same.helps
    assert same.report()["kept"] == "untuned"
    assert same.summary == "held-out divergence 1.5000, left untuned"
    assert not outcome(OUTPUT_DISTANCE, [2.0], [float("nan")]).helps


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_student_whose_units_are_found_on_the_way_is_the_cut_with_the_answers(
    written: Written, tmp_path: Path, family: str
) -> None:
    """Both sides of the final comparison are what the two checkpoints compute by themselves."""
    teacher = Checkpoint.open(written(recipe(family, blocks=4)))
    tokens, (fitting, judging) = random_tokens(12, 16), split_rows(12, 3)
    thin, gone = BlockShape(4, 4, 8, 24), BlockShape(0, 0, 8, 0)
    task = RecoveryTask(teacher, tokens, Fit(fitting, judging), ComputeOptions(), shapes=[thin, thin, gone, thin])
    tuned = TunedWeights(tmp_path)
    outcome = recover_student(task, tuned)
    assert outcome.masks.shapes_after(teacher.shapes) == outcome.student.shapes == (thin,) * 3
    assert outcome.masks.removed_blocks == [2]
    for index, dense in enumerate(outcome.masks.kept_blocks):
        assert torch.equal(tuned.mask(index).channels, outcome.masks.blocks[dense].channels)
        assert torch.equal(tuned.mask(index).heads, outcome.masks.blocks[dense].heads)
    dense = BlockStream(teacher, 16).forward(tokens[judging])
    for found, checkpoint in (
        (outcome.before, outcome.student),
        (outcome.after, tuned_checkpoint(outcome.student, tuned, ())),
    ):
        stream = BlockStream(checkpoint, 16)
        measured = outcome.objective.measure(stream, {"model": stream.forward(tokens[judging])}, dense)
        torch.testing.assert_close(found, measured["model"], rtol=1e-3, atol=1e-4)
    logits = streamed_logits(tuned_checkpoint(outcome.student, tuned, ()), tokens)
    rows, length = outcome.logits.shape[:2]
    torch.testing.assert_close(outcome.logits, logits[:rows, :length], atol=1e-3, rtol=0)
    assert not torch.allclose(outcome.before, outcome.after, rtol=1e-2)


class Killed(BaseException):
    pass


def test_a_run_killed_anywhere_resumes_to_the_same_bytes(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.artifacts.journal.PassJournal", partial(PassJournal, share=float("inf")))
    request = request_of(pruned())
    whole = tune(request, OutputOptions(tmp_path / "whole"))
    seen: list[tuple[str, int]] = []

    def kill_at_new(phase: str, done: int, total: int) -> None:
        if (phase, done) not in seen:
            seen.append((phase, done))
            raise Killed

    for _ in range(30):
        try:
            resumed = tune(request, OutputOptions(tmp_path / "out", resume=True), RunContext(progress=kill_at_new))
            break
        except Killed:
            assert not (tmp_path / "out").exists()
    assert len(seen) >= 5
    assert resumed.digest == whole.digest
    assert resumed.outputs == whole.outputs


def test_a_student_equal_to_its_teacher_is_not_changed(written: Written, pruned: Pruned, tmp_path: Path) -> None:
    """Nothing cut: every target is what the projection already gives."""
    request = request_of(pruned())
    dense = request.teacher
    same = replace(request, student=dense, masks=Masks.full(dense.shapes))
    tuned = TunedWeights(tmp_path)
    recover_student(same.task(same.calibration.read()), tuned)
    for index in range(dense.blocks):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = dense.read(f"model.layers.{index}.{name}.weight")
            torch.testing.assert_close(tuned.read(index, f"{name}.weight"), weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_bias_that_the_format_has_no_place_for_is_refused(pruned: Pruned, family: str) -> None:
    with pytest.raises(OptionError, match=f"The plain {family} format has no bias"):
        request_of(pruned(recipe(family, grouped=True, blocks=4)), TuneMethod.mask_bias)


def test_llama_switches_its_biases_on_and_opt_has_them(pruned: Pruned) -> None:
    assert request_of(pruned(), TuneMethod.mask_bias).bias_switches == ("attention_bias", "mlp_bias")
    assert request_of(pruned(), TuneMethod.auto).bias_switches == ()
    assert request_of(pruned(recipe("opt", blocks=4)), TuneMethod.mask_bias).bias_switches == ()


def test_calibration_defaults_to_that_of_the_cut(pruned: Pruned) -> None:
    assert request_of(pruned()).calibration.read().tokens.shape == (24, 16)
    assert request_of(pruned(), calibration_rows=4, calibration_length=8).calibration.read().tokens.shape == (4, 8)
    with pytest.raises(OptionError, match="--calibration-rows must be at least 2, not 1"):
        request_of(pruned(), calibration_rows=1)


def test_inputs_that_do_not_belong_together(pruned: Pruned, written: Written, tmp_path: Path) -> None:
    with pytest.raises(ForeignArtifactError, match="is not the checkpoint"):
        request_of(pruned(), dense=str(written(replace(LLAMA, seed=1))))
    with pytest.raises(MissingPathError):
        request_of(pruned(), dense=str(tmp_path / "absent"))
    with pytest.raises(ForeignArtifactError, match=r"no spine\.json"):
        request_of(written(LLAMA))


def test_a_moved_dense_checkpoint_can_be_named(
    pruned: Pruned, written: Written, sample_file: Path, tmp_path: Path
) -> None:
    dense = shutil.copytree(written(LLAMA), tmp_path / "dense")
    calibration = CalibrationConfig(text=str(sample_file), rows=8, length=16)
    options = PruneConfig(
        model=str(dense), sparsity=0.4, block_share=0.0, method="comp", metric="m0", calibration=calibration
    )
    prune(open_prune(options), OutputOptions(tmp_path / "out"))
    dense.rename(tmp_path / "moved")
    with pytest.raises(MissingPathError, match="--dense"):
        request_of(tmp_path / "out")
    assert request_of(tmp_path / "out", dense=str(tmp_path / "moved")).teacher.blocks == 4


def test_changed_files_of_a_pruned_checkpoint_are_refused(pruned: Pruned, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned(), tmp_path / "copy")
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    with pytest.raises(DamagedArtifactError, match=r"config\.json"):
        request_of(copy)


def test_masks_of_another_checkpoint_are_refused(pruned: Pruned, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned(), tmp_path / "copy")
    Masks(Masks.load(copy).blocks[:-1]).save(copy)
    with pytest.raises(DamagedArtifactError, match="masks"):
        request_of(copy)


def test_unknown_methods_are_told_with_the_known_ones() -> None:
    assert read_config(TuneConfig, None, {"pruned": "x", "method": "mask+bias"}).method is TuneMethod.mask_bias
    with pytest.raises(OptionError, match=r"mask, mask\+bias, lsq, auto"):
        read_config(TuneConfig, None, {"pruned": "x", "method": "magic"})
