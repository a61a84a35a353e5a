from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from families import VARIANTS, Recipe
from test_checkpoints_cutting import cut, fewer_heads, random_masks

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import block_costs, model_size, size_of

HEADS_STAY = ("opt", "olmo2", "olmo3", "gpt2", "gpt_neox", "distilbert")
Opened = Callable[[Recipe], Checkpoint]


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_equal_what_the_cut_model_holds(opened: Opened, tmp_path: Path, name: str) -> None:
    checkpoint = opened(VARIANTS[name])
    masks = random_masks(checkpoint, fewer_heads(checkpoint), 24, (1,))
    model = cut(checkpoint, masks, tmp_path / "cut")
    size = model_size(
        checkpoint, dict(zip(masks.kept_blocks, masks.shapes_after(checkpoint.shapes), strict=True)), context=16
    )
    blocks = sum(value.numel() for key, value in model.named_parameters() if re.search(r"\.(layers?|h)\.\d", key))
    assert size.block_parameters == blocks
    assert size.total_parameters == sum(value.numel() for value in model.parameters())
    assert size.bytes == Checkpoint.open(tmp_path / "cut").bytes


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_counts_equal_the_dense_model(opened: Opened, name: str) -> None:
    checkpoint = opened(VARIANTS[name])
    size = size_of(checkpoint, context=16)
    assert size.total_parameters == sum(value.numel() for value in VARIANTS[name].model().parameters())
    assert size.bytes == checkpoint.bytes


def test_half_precision_halves_the_bytes(opened: Opened) -> None:
    full, half = VARIANTS["llama"], replace(VARIANTS["llama"], dtype="float16")
    sizes = [size_of(opened(made), context=16) for made in (full, half)]
    assert sizes[0].bytes == 2 * sizes[1].bytes
    assert sizes[0].total_parameters == sizes[1].total_parameters


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_flops_are_counted_by_block(opened: Opened, name: str) -> None:
    checkpoint = opened(VARIANTS[name])
    none, one, three = (
        model_size(checkpoint, dict.fromkeys(range(blocks), checkpoint.shape), context=16).flops_per_token
        for blocks in (0, 1, 3)
    )
    assert none == 2 * checkpoint.config.vocab_size * checkpoint.d_model
    assert one > none
    assert three - none == 3 * (one - none)


def test_flops_of_a_block_by_hand(opened: Opened) -> None:
    checkpoint = opened(VARIANTS["llama"])
    short, long = (model_size(checkpoint, {0: checkpoint.shape}, context=c).flops_per_token for c in (16, 116))
    assert long - short == 100 * 4 * 32  # a product with every key and one with every value, 32 wide, per token
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 40)
    head = 2 * checkpoint.config.vocab_size * 32
    assert short == pytest.approx(head + matrices + 16 * 4 * 32, rel=0.005)


def test_units_add_up_to_the_block(opened: Opened) -> None:
    for name, made in VARIANTS.items():
        costs = block_costs(opened(made))
        shape = costs.dense
        fewer = replace(shape, channels=shape.channels - 1)
        assert costs.parameters(shape) - costs.parameters(fewer) == costs.channel, name
        assert (costs.kv_group == 0) == (made.family in HEADS_STAY), name
