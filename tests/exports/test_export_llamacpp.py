"""What llama.cpp makes of the files; skipped where llama-cpp-python is absent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from export_cases import EXPORTED, silenced_logits, uneven, written_gguf
from families import Recipe, answers, load, random_tokens, recipe
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.exports import llamacpp
from spinecli.exports.config import Quantization
from spinecli.exports.verification import relative_difference

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

Opened = Callable[[Recipe], Checkpoint]
LENGTH, NEW = 48, 12
# llama.cpp looks the error function up in a table of float16
GELU = ("gemma", "gpt2", "gpt_neox")


@torch.no_grad()
def greedy(directory: Path, tokens: Tensor, count: int) -> list[int]:
    """The likeliest next tokens by the whole model, computed anew for each."""
    model, row = load(directory), tokens
    for _ in range(count):
        row = torch.cat((row, answers(model, row[None])[0, -1].argmax()[None]))
    return row[len(tokens) :].tolist()


def difference(path: Path, tokens: Tensor, expected: Tensor, *, precise: bool) -> float:
    with llamacpp.opened(path, context=64, precise=precise) as model:
        return relative_difference(llamacpp.logits(model, tokens.tolist()), expected)


@pytest.mark.parametrize("name", EXPORTED)
def test_it_computes_what_torch_computes(opened: Opened, tmp_path: Path, name: str) -> None:
    made, architecture = EXPORTED[name]
    checkpoint, path = opened(made), tmp_path / "x.gguf"
    model = written_gguf(path, checkpoint)
    assert model.architecture.name == architecture
    tokens = random_tokens(1, min(LENGTH, model.context))[0]
    expected = answers(load(checkpoint.path), tokens[None])[0]
    exact = 2e-3 if name.startswith(GELU) else 1e-5
    assert difference(path, tokens, expected, precise=True) < exact
    assert difference(path, tokens, expected, precise=False) < 5e-3
    with llamacpp.opened(path, context=64, precise=True) as opened_file:
        count = min(NEW, model.context - 4)
        assert llamacpp.greedy(opened_file, tokens[:4].tolist(), count) == greedy(checkpoint.path, tokens[:4], count)


ALL = range(40)
Kept = Sequence[tuple[Sequence[int], Sequence[int]]]
UNEVEN: dict[str, Kept] = {
    "channels": [((0, 1), ALL), ((0, 1), range(24)), ((0, 1), range(3, 11)), ((0, 1), ALL)],
    "heads": [((1,), ALL), ((0, 1), ALL), ((0,), ALL), ((0, 1), ALL)],
    "attention removed": [((0, 1), ALL), ((), ALL), ((0,), range(16)), ((), range(30))],
    "attention of the first block removed": [((), ALL), ((0, 1), ALL), ((), ALL), ((1,), ALL)],
    "feed-forward removed": [((0, 1), ()), ((0,), ALL), ((0, 1), ()), ((0, 1), ())],
    "both kinds": [((0, 1), ALL), ((), range(12)), ((1,), ()), ((), range(25))],
}


@pytest.mark.parametrize("kept", UNEVEN.values(), ids=UNEVEN.keys())
@pytest.mark.parametrize(
    "made",
    [
        recipe("llama", grouped=True, blocks=4),
        recipe("qwen2", grouped=True, blocks=4),
        recipe("qwen3", grouped=True, blocks=4),
    ],
    ids=lambda made: made.family,
)
def test_blocks_that_differ_compute_what_torch_computes(
    opened: Opened, tmp_path: Path, made: Recipe, kept: Kept
) -> None:
    dense, path = opened(made), tmp_path / "x.gguf"
    written_gguf(path, uneven(dense, kept))
    tokens = random_tokens(1, LENGTH)[0]
    expected = silenced_logits(dense, kept, tokens[None])[0]
    assert difference(path, tokens, expected, precise=True) < 1e-5


@pytest.mark.parametrize("quantization", [Quantization.q8_0, Quantization.q4_0])
def test_quantised_files_open(opened: Opened, tmp_path: Path, quantization: Quantization) -> None:
    checkpoint, path = opened(recipe("llama", grouped=True, channels=64)), tmp_path / "x.gguf"
    written_gguf(path, checkpoint, quantization)
    tokens = random_tokens(1, LENGTH)[0]
    expected = answers(load(checkpoint.path), tokens[None])[0]
    # a step of q8_0 is 1/254 of the range of 32 weights and one of q4_0 1/16; random blocks amplify what that rounds
    bound = 0.15 if quantization is Quantization.q8_0 else 0.8
    assert difference(path, tokens, expected, precise=False) < bound


def test_quantised_blocks_that_differ_open(opened: Opened, tmp_path: Path) -> None:
    dense = opened(recipe("llama", grouped=True, blocks=2, channels=64))
    kept = [((0, 1), range(32)), ((1,), ())]
    path = tmp_path / "x.gguf"
    written_gguf(path, uneven(dense, kept), Quantization.q8_0)
    tokens = random_tokens(1, LENGTH)[0]
    assert difference(path, tokens, silenced_logits(dense, kept, tokens[None])[0], precise=False) < 0.15
