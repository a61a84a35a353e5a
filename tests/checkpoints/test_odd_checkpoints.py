"""Plausible but odd: right or refused, never silently something else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from families import POSITIONS, random_tokens
from odd_checkpoints import ODD
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.skeleton import auto_class
from spinecli.checkpoints.stream.block_stream import answer, answering_by_last_token
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.errors import UserError

OPENED = [name for name, odd in ODD.items() if not odd.refused]
REFUSED = [name for name, odd in ODD.items() if odd.refused]


def answers(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    model = answering_by_last_token(model.eval())
    with torch.no_grad():
        return torch.cat([answer(model(row[None], use_cache=False)) for row in tokens])


def by_transformers(directory: Path, checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    config = AutoConfig.from_pretrained(directory)
    config.return_dict, config.torchscript = True, False  # how answers come, not which
    return answers(auto_class(checkpoint.task).from_pretrained(directory, config=config, dtype=torch.float32), tokens)


def narrow(checkpoint: Checkpoint) -> Masks:
    """Half of the channels of every block, and not the second block."""
    masks = []
    for index, shape in enumerate(checkpoint.shapes):
        stays = index != 1
        channels = torch.arange(shape.channels) < shape.channels // 2
        masks.append(BlockMask(torch.full((shape.heads,), stays), channels & stays))
    return Masks(tuple(masks))


@pytest.mark.parametrize("name", OPENED)
def test_it_computes_what_transformers_computes_and_so_does_a_cut(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd, directory = ODD[name], tmp_path / "odd"
    odd.recipe.write(directory)
    odd.change(directory)
    tokens = random_tokens(2, min(40, POSITIONS - 2))
    with caplog.at_level(logging.WARNING, logger="spinecli"):
        checkpoint = Checkpoint.open(directory)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert bool(said) == bool(odd.noted), said
    assert all(word in said for word in odd.noted), said
    expected = answers(odd.recipe.model(), tokens) if odd.as_made else by_transformers(directory, checkpoint, tokens)
    torch.testing.assert_close(streamed_logits(checkpoint, tokens), expected, rtol=1e-4, atol=1e-4)
    cut = tmp_path / "cut"
    cut.mkdir()
    masks = narrow(checkpoint)
    write_cut(cut, checkpoint, masks)
    silenced = streamed_logits(checkpoint, tokens, masks)
    torch.testing.assert_close(by_transformers(cut, checkpoint, tokens), silenced, rtol=2e-2, atol=2e-2)
    assert not (silenced - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    odd, directory = ODD[name], tmp_path / "odd"
    odd.recipe.write(directory)
    odd.change(directory)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(directory)
    sentence = str(caught.value)
    assert all(word in sentence for word in (str(directory), *odd.refused)) or "model type" in sentence, sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
