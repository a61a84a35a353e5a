from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import Recipe, classifier, random_tokens, recipe
from safetensors.torch import load_file, save_file

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream import whole_model
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.stream.verify import probe, streamed_logits, verify_reading, verify_written
from spinecli.checkpoints.tensors import held
from spinecli.errors import SpineError, VerificationError

TOKENS = random_tokens(2, 16)


def verify(directory: Path, expected: torch.Tensor) -> float:
    return verify_written(directory, TOKENS, expected, ComputeOptions())


@pytest.fixture
def copy(written: Callable[[Recipe], Path], tmp_path: Path) -> Path:
    return shutil.copytree(written(recipe("llama")), tmp_path / "copy")


def test_a_faithful_copy_passes(copy: Path) -> None:
    assert verify(copy, streamed_logits(Checkpoint.open(copy), TOKENS)) < 1e-5


def test_a_slightly_different_weight_is_caught(copy: Path) -> None:
    expected = streamed_logits(Checkpoint.open(copy), TOKENS)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(VerificationError, match="nothing was published"):
        verify(copy, expected)


def test_nan_logits_are_caught(copy: Path) -> None:
    expected = streamed_logits(Checkpoint.open(copy), TOKENS)
    with pytest.raises(VerificationError):
        verify(copy, expected * float("nan"))


def test_a_tensor_that_transformers_would_not_load_is_caught(copy: Path) -> None:
    expected = streamed_logits(Checkpoint.open(copy), TOKENS)
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "model.layers.3.mlp.down_proj.weight": torch.ones(32, 40)}, copy / "model.safetensors")
    with pytest.raises(VerificationError, match="unexpected keys"):
        verify(copy, expected)


def test_a_config_with_too_many_blocks_is_caught(copy: Path) -> None:
    """transformers would fill the missing block at random and say nothing."""
    expected = streamed_logits(Checkpoint.open(copy), TOKENS)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(SpineError):
        verify(copy, expected)


def test_probe_is_a_corner_of_the_rows(opened: Callable[[Recipe], Checkpoint]) -> None:
    causal = opened(recipe("llama"))
    assert probe(causal, random_tokens(5, 100)).shape == (2, 64)
    assert probe(causal, random_tokens(1, 10)).shape == (1, 10)
    for whole in (recipe("bert"), classifier("bert"), classifier("llama")):  # what comes later bears on the answer
        assert probe(opened(whole), random_tokens(5, 100)).shape == (2, 100)


@pytest.mark.parametrize("made", [recipe("llama", tied=True), recipe("gpt2", tied=True), recipe("opt"), recipe("bert")])
def test_large_models_are_compared_with_their_blocks_left_on_disk(
    opened: Callable[[Recipe], Checkpoint], made: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(made)
    monkeypatch.setattr(whole_model, "WHOLE_MODEL_BYTES", 0)
    verify_reading(checkpoint, TOKENS)
    name = next(name for name in checkpoint.tensors if name.startswith(checkpoint.block_prefix(1)))
    wrong = replace(checkpoint, tensors={**checkpoint.tensors, name: held(checkpoint.read(name) + 0.5)})
    with pytest.raises(VerificationError, match="differently from transformers"):
        verify_reading(wrong, TOKENS)
