from __future__ import annotations

from collections.abc import Callable

from families import Recipe, recipe

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import cut_checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.pruning.decision import engines

Opened = Callable[[Recipe], Checkpoint]


def test_row_lengths_decide_between_the_quantised_types(opened: Opened) -> None:
    fitting = engines(opened(recipe("llama", channels=64)))
    assert fitting["llama.cpp Q8_0, Q4_0"] == "yes"
    assert fitting["llama.cpp K-quants"] == "no: 32 is not a multiple of 256"
    assert engines(opened(recipe("llama", channels=40)))["llama.cpp Q8_0, Q4_0"] == "no: 40 is not a multiple of 32"


def test_what_export_refuses_is_said_beforehand(opened: Opened) -> None:
    for family, words in (("opt", "opt as GGUF"), ("bert", "causal language models")):
        verdict = engines(opened(recipe(family)))["llama.cpp"]
        assert verdict.startswith("no: ")
        assert words in verdict


def without_block(checkpoint: Checkpoint, index: int) -> Checkpoint:
    masks = Masks.full(checkpoint.shapes)
    masks.blocks[index].heads[:] = False
    masks.blocks[index].channels[:] = False
    return cut_checkpoint(checkpoint, masks)


def test_a_pattern_of_blocks_may_break_when_one_leaves(opened: Opened) -> None:
    dense = opened(recipe("smollm3", blocks=6))
    assert engines(dense)["llama.cpp f16"] == "yes"
    assert engines(without_block(dense, 0))["llama.cpp"].startswith("no: has no_rope_layers [1, 1, 0, 1, 1]")
    assert engines(without_block(dense, 5))["llama.cpp f16"] == "yes"


def test_blocks_that_differ_need_the_shipped_module(opened: Opened) -> None:
    dense = opened(recipe("llama", blocks=3))
    masks = Masks.full(dense.shapes)
    masks.blocks[0].channels[:8] = False
    found = engines(cut_checkpoint(dense, masks))
    assert found["transformers"] == "with trust_remote_code=True"
    assert found["llama.cpp f16"] == "yes"
