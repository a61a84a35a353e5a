from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import VARIANTS, Recipe, classifier, load, recipe
from small_splits import LABELS, LLAMA, SplitMaker, Watched, moved, random_batch, split_model

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.data.batches import IGNORED, collate
from spinecli.data.config import CalibrationConfig, Task
from spinecli.errors import VerificationError
from spinecli.federation import launch as launching
from spinecli.federation.launch import launch
from spinecli.federation.split.run import evaluate, verify_joined, write_joined
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request as open_pruning

Opened = Callable[[Recipe], Checkpoint]

CASES: list[tuple[Recipe, Task]] = [
    (LLAMA, "classification"),
    (LLAMA, "language"),
    (VARIANTS["llama grouped tied"], "language"),
    (VARIANTS["llama grouped tied"], "classification"),
    (VARIANTS["mistral"], "classification"),
    (VARIANTS["qwen2"], "language"),
    (VARIANTS["qwen3"], "classification"),
    (VARIANTS["opt"], "language"),
    (VARIANTS["opt"], "classification"),
    (VARIANTS["opt post-norm"], "classification"),
    (VARIANTS["bert"], "classification"),
    (VARIANTS["bert bare"], "classification"),
    (VARIANTS["roberta masked"], "classification"),
    (VARIANTS["narrow bert"], "classification"),
    (VARIANTS["narrow roberta bare"], "classification"),
]
NAMES = [f"{number} {made.family} {task}" for number, (made, task) in enumerate(CASES)]
THREE = ("calm", "loud", "odd")


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize(("made", "task"), CASES, ids=NAMES)
def test_the_joined_checkpoint_answers_as_the_split_model(
    opened: Opened, tmp_path: Path, made: Recipe, task: Task, way: str
) -> None:
    model = split_model(opened(made), 2, task=task, bottom=way, top=way)
    trained = moved({**model.bottom_start, **model.top_start})
    write_joined(tmp_path, model, trained, THREE if task == "classification" else ())
    plain = load(tmp_path)
    batch = random_batch([6, 9, 3], task=task)
    expected, _ = model.joined_answers(trained, batch)
    features = model.features({name: trained[name] for name in model.bottom_names}, batch)
    split, _ = model.answers(
        {name: trained[name] for name in model.top_names}, features, batch.attention_mask, batch.labels
    )
    with torch.no_grad():
        logits = plain(**batch.model_inputs()).logits
    if task == "language":
        logits = logits[:, :-1][batch.labels[:, 1:] != IGNORED]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, split, atol=1e-5, rtol=1e-5)
    if task == "classification":
        assert plain.config.id2label == dict(enumerate(THREE))
        assert plain.config.label2id == {label: number for number, label in enumerate(THREE)}


@pytest.fixture
def joined(splits: SplitMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setattr(launching, "can_plot", lambda: False)

    def publish(made: Recipe = LLAMA, **changes: object) -> Path:
        launch(splits(made, rounds=1, local_steps=1, **changes), OutputOptions(tmp_path / "out"))
        return tmp_path / "out"

    return publish


@pytest.mark.parametrize(
    ("made", "task"), [(LLAMA, "classification"), (LLAMA, "language"), (classifier("bert"), "classification")]
)
def test_a_published_run_can_be_pruned(
    joined: Callable[..., Path], sample_file: Path, made: Recipe, task: Task
) -> None:
    out = joined(made, task=task)
    options = PruneConfig(
        model=str(out),
        sparsity=0.2,
        block_share=0.0,
        calibration=CalibrationConfig(text=str(sample_file), rows=4, length=16),
    )
    request = open_pruning(options)
    assert request.checkpoint.blocks == made.blocks
    assert request.lineage[-1].command == "fed-launch"


def test_a_published_run_names_its_labels(joined: Callable[..., Path]) -> None:
    config = json.loads((joined() / "config.json").read_text())
    assert config["id2label"] == {"0": LABELS[0], "1": LABELS[1]}
    assert config["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("strategy", ["mergesfl", "fedavg"])
def test_a_published_run_answers_as_its_last_evaluation_says(
    splits: SplitMaker, joined: Callable[..., Path], strategy: str
) -> None:
    out = joined(strategy=strategy)
    watched = Watched(splits(strategy=strategy, rounds=1, local_steps=1))
    (record,) = watched.go_on()
    data = watched.request.evaluation
    batch = collate(data, list(range(len(data))))
    with torch.no_grad():
        logits = load(out)(**batch.model_inputs()).logits
    assert record.evaluation is not None
    assert float(torch.nn.functional.cross_entropy(logits, batch.labels)) == pytest.approx(
        record.evaluation.loss, abs=1e-5
    )
    assert float((logits.argmax(dim=1) == batch.labels).float().mean()) == pytest.approx(record.evaluation.accuracy)


@pytest.mark.parametrize("task", ["classification", "language"])
def test_the_evaluation_is_a_mean_over_all_answers(splits: SplitMaker, task: Task) -> None:
    watched = Watched(splits(task=task))
    model, data = watched.federation.model, watched.request.evaluation
    logits, targets = model.joined_answers(watched.trained, collate(data, list(range(len(data)))))
    found = evaluate(model, watched.trained, data)
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    assert found.accuracy == pytest.approx(float((logits.argmax(dim=1) == targets).float().mean()))


def test_a_checkpoint_that_answers_otherwise_is_not_published(
    opened: Opened, splits: SplitMaker, tmp_path: Path
) -> None:
    watched = Watched(splits())
    model, data = watched.federation.model, watched.request.evaluation
    write_joined(tmp_path, model, watched.trained, LABELS)
    assert verify_joined(tmp_path, model, watched.trained, data) < 1e-4
    with pytest.raises(VerificationError, match="nothing was published"):
        verify_joined(tmp_path, model, moved(watched.trained, by=0.5), data)


def test_a_checkpoint_in_half_precision_stays_so(opened: Opened, tmp_path: Path) -> None:
    model = split_model(opened(recipe("llama", dtype="bfloat16")), 1)
    trained = moved({**model.bottom_start, **model.top_start})
    write_joined(tmp_path, model, trained, THREE)
    assert Checkpoint.open(tmp_path).storage_dtype is torch.bfloat16
