from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import Recipe, random_tokens, recipe
from transformers import AutoModelForCausalLM

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.rows import TokenRows
from spinecli.healing import targets
from spinecli.healing.targets import TargetCache, ask_teacher

Written = Callable[[Recipe], Path]
ROWS, LENGTH, K = 7, 12, 5


def rows_of(tokens: torch.Tensor) -> TokenRows:
    return TokenRows(tokens, ("text",), torch.zeros(len(tokens), dtype=torch.int64))


def asked(path: Path, directory: Path, temperature: float = 1.0) -> TargetCache:
    rows = rows_of(random_tokens(ROWS, LENGTH))
    return ask_teacher(Checkpoint.open(path), rows, K, temperature, ComputeOptions(), directory, RunContext())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_answers_are_those_of_the_model_that_transformers_loads(
    written: Written, tmp_path: Path, family: str, temperature: float
) -> None:
    path = written(recipe(family))
    cache = asked(path, tmp_path, temperature)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(random_tokens(ROWS, LENGTH)).logits[:, :-1]
    expected = (logits / temperature).log_softmax(dim=-1)
    tokens, found = cache.read(torch.arange(ROWS))
    assert tokens.shape == found.shape == (ROWS, LENGTH - 1, K)
    torch.testing.assert_close(found, expected.topk(K, dim=-1).values, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(expected.gather(-1, tokens), found, rtol=2e-3, atol=2e-3)


def test_parts_are_the_same_as_the_whole_and_are_not_asked_again(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(recipe("llama"))
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = asked(path, tmp_path / "whole").read(torch.arange(ROWS))
    monkeypatch.setattr(targets, "_STREAM_BYTES", 2 * 3 * LENGTH * 32 * 4)  # three rows of width 32 in a part
    cache = asked(path, tmp_path / "parts")
    assert len(list((tmp_path / "parts").iterdir())) == 3
    scattered = torch.tensor([6, 0, 3])
    for found, expected in zip(cache.read(scattered), whole, strict=True):
        assert torch.equal(found, expected[scattered])
    before = cache.path(1).stat().st_mtime_ns
    cache.path(2).unlink()
    asked(path, tmp_path / "parts")
    assert cache.path(1).stat().st_mtime_ns == before
    assert torch.equal(cache.read(scattered)[0], whole[0][scattered])
