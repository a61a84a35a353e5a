"""What fine-tuning changed, carried over the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import LABELS, Recipe, answers, classifier, load, random_tokens, recipe
from test_checkpoints_cutting import random_masks

from spinecli.checkpoints.checkpoint import Checkpoint, fine_tuned
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.stream.verify import streamed_logits, verify_written

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(3, 12)
NAMES = {"id2label": {str(index): f"kind {index}" for index in range(LABELS)}}


def changed(checkpoint: Checkpoint, made: Recipe) -> dict[str, torch.Tensor]:
    """The head and one output projection of another random model of the same shapes."""
    other = made.model().state_dict()
    projection = f"{checkpoint.family.blocks}.1.{checkpoint.family.feed_forward.output}.weight"
    heads = (checkpoint.family.classification_head, "bert.pooler", "roberta.pooler")
    return {name: value for name, value in other.items() if name.startswith(heads) or name == projection}


@pytest.mark.parametrize(
    "base",
    [
        recipe("llama", grouped=True),
        recipe("qwen2", tied=True),
        recipe("bert"),
        recipe("bert", task="encoding"),
        recipe("roberta", task="encoding", dtype="float16"),
        classifier("roberta"),
        classifier("opt"),
    ],
    ids=lambda made: f"{made.family} {made.task}",
)
def test_a_fine_tuned_classifier_is_cut_and_written_like_any_other(
    opened: Opened, tmp_path: Path, base: Recipe
) -> None:
    checkpoint = opened(base)
    goal = replace(base, task="classification", dtype="float32", seed=1)
    values = changed(checkpoint, goal)
    assert len(values) >= 2
    tuned = fine_tuned(checkpoint, Task.classification, values, NAMES)
    masks = random_masks(tuned, tuned.shape.kv_heads, 24, (2,))
    write_cut_checked(tmp_path / "out", tuned, masks)
    model = load(tmp_path / "out")
    assert model.config.id2label == {index: f"kind {index}" for index in range(LABELS)}
    assert answers(model, TOKENS).shape == (3, LABELS)

    whole = goal.model()
    state = dict(values)
    for name, value in whole.state_dict().items():
        if name not in values:
            alias = name if name in checkpoint.tensors else name.partition(".")[2]
            state[name] = checkpoint.read(alias).float() if alias in checkpoint.tensors else value
    whole.load_state_dict(state)
    for index, mask in enumerate(masks.blocks):
        block = whole.get_submodule(f"{checkpoint.family.blocks}.{index}")
        block.get_submodule(checkpoint.family.feed_forward.output).weight.data[:, ~mask.channels] = 0
    del whole.get_submodule(checkpoint.family.blocks)[2]
    whole.config.num_hidden_layers = 2
    tolerance = 1e-4 if base.dtype == "float32" else 0.05
    torch.testing.assert_close(answers(model, TOKENS), answers(whole, TOKENS), atol=tolerance, rtol=0)


def write_cut_checked(directory: Path, tuned: Checkpoint, masks: Masks) -> None:
    directory.mkdir()
    write_cut(directory, tuned, masks)
    expected = streamed_logits(tuned, TOKENS, masks)
    assert expected.std() > 0.01
    assert verify_written(directory, TOKENS, expected, ComputeOptions()) < 1e-4


def test_a_merged_language_model_keeps_its_head(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama", tied=True))
    name = "model.layers.0.self_attn.q_proj.weight"
    tuned = fine_tuned(checkpoint, Task.causal_lm, {name: checkpoint.read(name) + 1})
    write_cut_checked(tmp_path / "out", tuned, Masks.full((tuned.shape,) * 3))
    found = Checkpoint.open(tmp_path / "out")
    differing = [each for each in checkpoint.tensors if not torch.equal(found.read(each), checkpoint.read(each))]
    assert differing == [name]
    assert set(found.tensors) == set(checkpoint.tensors)


@pytest.mark.parametrize(
    ("base", "values", "words"),
    [
        (recipe("bert"), {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}, "pooler"),
        (recipe("llama"), {}, "score.weight"),
        (recipe("llama"), {"score.weight": torch.ones(2, 32)}, "score.weight has shape"),
        (recipe("llama"), {"score.weight": torch.ones(3, 32), "lora_A": torch.ones(1)}, "lora_A is no tensor"),
    ],
    ids=["no pooler", "no head", "other labels", "adapter not merged"],
)
def test_what_does_not_make_a_model_is_refused(
    opened: Opened, base: Recipe, values: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fine_tuned(opened(base), Task.classification, values, NAMES)
