from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Recipe, random_tokens, recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import Manifest, damaged_files, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import MASKS_NAME
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.config import make_config
from spinecli.data.config import CalibrationConfig
from spinecli.data.rows import TokenRows
from spinecli.errors import (
    CalibrationTextError,
    ForeignArtifactError,
    MissingPathError,
    OptionError,
    TrainingError,
)
from spinecli.healing import distillation
from spinecli.healing.config import DistillConfig, HealConfig, Loss, Train
from spinecli.healing.cost import foresee
from spinecli.healing.curve import curve_of
from spinecli.healing.distillation import Distillation, Lesson, share_of_peak
from spinecli.healing.request import HealRequest, open_request
from spinecli.healing.run import heal
from spinecli.healing.student import Student
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

Written = Callable[[Recipe], Path]
Cut = Callable[..., Path]
LLAMA = recipe("llama", grouped=True, blocks=4)
FAMILIES = [
    LLAMA,
    recipe("qwen3", grouped=True, blocks=4, tied=True, dtype="bfloat16"),
    recipe("gemma2", grouped=True, blocks=4),
    recipe("phi3", grouped=True, blocks=4),
    recipe("gpt2", blocks=4),
    recipe("opt", blocks=4),
    recipe("gpt_neox", blocks=4),
]


@pytest.fixture(scope="session")
def cut(written: Written, sample_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """A cut checkpoint, made once per recipe. Tests must not change it."""
    made: dict[Any, Path] = {}

    def make(chosen: Recipe = LLAMA, **options: Any) -> Path:
        key = (chosen, *options.items())
        if key not in made:
            out = tmp_path_factory.mktemp("cut") / "out"
            calibration = CalibrationConfig(text=(str(sample_file),), rows=24, length=16)
            asked = {"method": "comp", "metric": "m0", "block_share": 0.5, "sparsity": 0.4, **options}
            if asked["method"] != "comp":
                del asked["metric"], asked["block_share"]
            prune(
                open_prune(PruneConfig(model=str(written(chosen)), calibration=calibration, **asked)),
                OutputOptions(out),
            )
            made[key] = out
        return made[key]

    return make


def request_of(directory: Path, **changes: Any) -> HealRequest:
    asked = {"tokens": 8_000, "text_length": 32, "batch_size": 4, "learning_rate": 3e-3, "rank": 4, **changes}
    return open_request(make_config(HealConfig, str(directory), asked))


def healed(directory: Path, out: Path, **changes: Any) -> Manifest:
    return heal(request_of(directory, **changes), OutputOptions(out))


@pytest.mark.parametrize("chosen", FAMILIES, ids=lambda chosen: chosen.family)
def test_healing_brings_the_cut_nearer_to_the_dense_model(
    cut: Cut, written: Written, tmp_path: Path, chosen: Recipe
) -> None:
    manifest = healed(cut(chosen), tmp_path / "out")
    assert manifest.report["kept"] == "healed"
    assert not damaged_files(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert (tmp_path / "out" / MASKS_NAME).read_bytes() == (cut(chosen) / MASKS_NAME).read_bytes()
    tokens = random_tokens(8, 32)
    dense, before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (written(chosen), cut(chosen), tmp_path / "out")
    )
    with torch.no_grad():
        wanted, *found = (model(tokens).logits.log_softmax(dim=-1) for model in (dense, before, after))
    distances = [float((wanted.exp() * (wanted - each)).sum(dim=-1).mean()) for each in found]
    assert distances[1] < distances[0]


@pytest.mark.parametrize("train", list(Train))
@pytest.mark.parametrize("loss", list(Loss))
def test_everything_that_can_be_trained_lowers_what_it_is_to_lower(
    cut: Cut, tmp_path: Path, train: Train, loss: Loss
) -> None:
    manifest = healed(cut(), tmp_path / "out", train=train.value, loss=loss.value, temperature=1.5)
    report: Any = manifest.report
    assert report["held_out_after"] < report["held_out_before"]
    assert report["curve"][0]["step"] == 0
    assert ("dense" in manifest.inputs) == (loss is not Loss.lm)


def test_below_the_depth_nothing_changes(cut: Cut, tmp_path: Path) -> None:
    assert healed(cut(), tmp_path / "out", depth=2).report["kept"] == "healed"
    before, after = (Checkpoint.open(path) for path in (cut(), tmp_path / "out"))
    lowest = f"model.layers.{before.blocks - 2}."
    changed = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    assert changed
    assert all(name >= lowest for name in changed)
    assert f"{lowest}self_attn.q_proj.weight" in changed


def test_adaptive_widths_are_healed(cut: Cut, tmp_path: Path) -> None:
    directory = cut(method="spine", widths="adaptive", effort="fast")
    assert healed(directory, tmp_path / "out").report["kept"] == "healed"
    assert Checkpoint.open(tmp_path / "out").shapes == Checkpoint.open(directory).shapes


def test_a_healed_checkpoint_can_be_healed_again(cut: Cut, tmp_path: Path) -> None:
    healed(cut(), tmp_path / "once")
    manifest = healed(tmp_path / "once", tmp_path / "twice", seed=1)
    assert [step.command for step in manifest.lineage] == ["", "prune", "heal"]


def test_what_does_not_help_is_not_kept(cut: Cut, tmp_path: Path) -> None:
    manifest = healed(cut(), tmp_path / "out", learning_rate=0.5)
    assert manifest.report["kept"] == "as it was"
    before, after = (Checkpoint.open(path) for path in (cut(), tmp_path / "out"))
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_the_best_on_held_out_rows_is_published(cut: Cut, tmp_path: Path) -> None:
    report: Any = healed(cut(), tmp_path / "out", tokens=20_000, learning_rate=2e-2).report
    best = min(judged["held_out"] for judged in report["curve"])
    assert report["held_out_after"] == pytest.approx(best, rel=1e-3)


def test_the_curve_is_read_again_and_drawn(cut: Cut, tmp_path: Path) -> None:
    manifest = healed(cut(), tmp_path / "out")
    curve = curve_of(tmp_path / "out")
    assert curve is not None
    assert [judged.model_dump() for judged in curve.curve] == manifest.report["curve"]
    assert curve_of(cut()) is None
    assert curve_of(tmp_path) is None
    pytest.importorskip("matplotlib")
    drawn = {}
    for name, directory in (("cut", cut()), ("healed", tmp_path / "out")):
        result = CliRunner().invoke(app, ["inspect", str(directory), "--plot", str(tmp_path / f"{name}.svg")])
        assert result.exit_code == 0, result.stderr
        drawn[name] = (tmp_path / f"{name}.svg").read_text()
    assert "million tokens" in drawn["healed"]
    assert "million tokens" not in drawn["cut"]


def test_held_out_rows_are_never_trained_on(cut: Cut) -> None:
    request = request_of(cut(), tokens=20_000)
    rows = request.text.read()
    student = Student(request.student, request.config.training, request.compute, 0)
    lesson = Lesson(rows, request.held_out, None)
    run = Distillation(student, lesson, request.config.training, 20_000, 0)
    seen = torch.cat(list(run._order(0)))
    assert lesson.held_out >= 2
    assert int(seen.max()) < lesson.trained_on
    counts = torch.bincount(seen, minlength=lesson.trained_on)
    assert counts.max() - counts.min() <= 1


class KilledError(Exception):
    pass


def test_a_run_killed_anywhere_resumes_to_the_same_bytes(
    cut: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = PassJournal.__init__
    monkeypatch.setattr(PassJournal, "__init__", lambda self, *args: saved(self, *args, share=1.0))
    whole = healed(cut(), tmp_path / "whole", tokens=4_000)
    moments: list[tuple[str, int]] = []

    def kill_at_new(phase: str, done: int, total: int) -> None:
        if (phase, done) not in moments:
            moments.append((phase, done))
            raise KilledError

    resumed = None
    while resumed is None:
        try:
            context = RunContext(progress=kill_at_new)
            resumed = heal(request_of(cut(), tokens=4_000), OutputOptions(tmp_path / "out", resume=True), context)
        except KilledError:
            assert not (tmp_path / "out").exists()
    assert len(moments) > 30
    assert resumed.digest == whole.digest
    assert resumed.outputs == whole.outputs


def test_recomputing_activations_changes_nothing_but_memory(cut: Cut, tmp_path: Path) -> None:
    once = healed(cut(), tmp_path / "once")
    again = healed(cut(), tmp_path / "again", recompute=True)
    assert again.outputs == once.outputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_step_has_the_gradients_of_plain_peft(written: Written, family: str) -> None:
    path = written(recipe(family))
    checkpoint = Checkpoint.open(path)
    tokens = random_tokens(4, 24)
    rows = TokenRows(tokens, ("text",), torch.zeros(4, dtype=torch.int64))
    config = DistillConfig(loss=Loss.lm, rank=4, batch_size=2)
    student = Student(checkpoint, config, ComputeOptions(), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.trained.items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    Distillation(student, Lesson(rows, 2, None), config, 1000, 0)._losses_of(torch.arange(2), scale=1 / 46)

    targets = sorted({name.rpartition(".lora_A")[0].rpartition(".")[2] for name in student.trained if "lora_A" in name})
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path).eval(),
        LoraConfig(r=4, lora_alpha=4, target_modules=targets, fan_in_fan_out=family == "gpt2"),
    )
    known = dict(plain.named_parameters())
    for name, parameter in student.trained.items():
        if "lora_" in name:
            known[f"base_model.model.{name}"].data.copy_(parameter.data)
    plain(input_ids=tokens[:2], labels=tokens[:2]).loss.backward()
    for name, parameter in student.trained.items():
        if "lora_" in name:
            torch.testing.assert_close(parameter.grad, known[f"base_model.model.{name}"].grad, rtol=1e-3, atol=1e-6)


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    shares = [share_of_peak(step, 100) for step in range(1, 101)]
    assert max(shares) == 1
    assert shares[:5] == sorted(shares[:5])
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[-1] < 1e-3
    assert math.isclose(share_of_peak(1, 1), 1)


def test_a_loss_that_is_no_number_ends_the_run(cut: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_CLIP_NORM", math.inf)
    with pytest.raises(TrainingError, match="lower --learning-rate"):
        healed(cut(), tmp_path / "out", learning_rate=1e30)
    assert not (tmp_path / "out").exists()


def test_mistakes_get_a_sentence(cut: Cut, written: Written, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("bat dis kos " * 30)
    with pytest.raises(CalibrationTextError, match="--text-length"):
        request_of(cut(), text=str(short))
    with pytest.raises(OptionError, match="--text names"):
        request_of(cut(), text=[str(short), str(short)])
    with pytest.raises(OptionError, match="--text-length"):
        request_of(cut(), text_length=4096)
    with pytest.raises(MissingPathError):
        request_of(cut(), dense=str(tmp_path / "nowhere"))
    with pytest.raises(ForeignArtifactError, match="is not the checkpoint"):
        request_of(cut(), dense=str(written(recipe("llama", seed=5))))
    with pytest.raises(OptionError, match="--loss lm"):
        request_of(written(LLAMA))
    with pytest.raises(OptionError, match="too narrow for gradients"):
        request_of(cut(), dtype="float16")
    with pytest.raises(OptionError, match="--depth 9 is more"):
        request_of(cut(), depth=9)
    with pytest.raises(OptionError, match="causal language models"):
        request_of(written(recipe("bert")))
    with pytest.raises(ForeignArtifactError, match="is no cut of"):
        request_of(written(recipe("llama", blocks=6)), dense=str(written(LLAMA)))


def test_a_teacher_with_another_vocabulary_is_refused(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ForeignArtifactError, match="another vocabulary"):
        request_of(written(LLAMA), dense="builtin:tiny")


def test_the_estimate_knows_what_is_trained(cut: Cut) -> None:
    for train, depth in ((Train.lora, 1), *((each, None) for each in Train)):
        request = request_of(cut(), train=train.value, depth=depth)
        student = Student(request.student, request.config.training, request.compute, 0)
        counted = sum(
            each.numel() for name, each in student.trained.items() if train is not Train.lora or "lora_" in name
        )
        foreseen: Any = foresee(request)
        assert foreseen["trained_parameters"] == counted
        assert foreseen["memory_bytes"] > 0
        assert foreseen["predicted_seconds"] > 0
