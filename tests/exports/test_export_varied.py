"""Checkpoints whose blocks differ, as `spine prune` writes them, on their way to a device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import field_of
from families import Recipe, answers, load, random_tokens, recipe
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.exports import llamacpp
from spinecli.exports.verification import relative_difference

Opened = Callable[[Recipe], Checkpoint]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# per block: which of the two KV groups stay, and how many of the 40 channels
KEPT = [((1, 1), 40), ((0, 1), 24), ((1, 0), 0), ((0, 0), 40)]


def cut(checkpoint: Checkpoint, directory: Path) -> Path:
    """The checkpoint cut to `KEPT`."""
    blocks = []
    for groups, channels in KEPT:
        heads = torch.tensor(groups, dtype=torch.bool).repeat_interleave(checkpoint.shape.group_size)
        blocks.append(BlockMask(heads, torch.arange(checkpoint.shape.channels) < channels))
    directory.mkdir()
    write_cut(directory, checkpoint, Masks(tuple(blocks)))
    return directory


def export(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["export", *map(str, arguments), "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def lora(directory: Path, base: Path) -> Path:
    """An adapter with other ranks in other blocks, on the projections that are there."""
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "o_proj", "up_proj"],
        rank_pattern={r"layers\.0\..*": 5, r"layers\.3\.mlp\.up_proj": 3},
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(load(base), settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(params=FAMILIES)
def varied(request: pytest.FixtureRequest, opened: Opened, tmp_path: Path) -> Path:
    return cut(opened(recipe(request.param, grouped=True, blocks=4)), tmp_path / f"{request.param}-cut")


def test_a_plain_directory_keeps_its_modules_and_takes_the_adapter(varied: Path, tmp_path: Path) -> None:
    adapter, out = lora(tmp_path / "lora", varied), tmp_path / "plain"
    report = export(varied, "--format", "hf", "--out", out, "--adapter", adapter)
    assert report["adapter"]["merged_tensors"] == 3 + 3 + 3
    assert (out / "modeling_varied.py").is_file()
    assert not (out / "masks.safetensors").exists()
    tokens = random_tokens(2, 20)
    expected = answers(PeftModel.from_pretrained(load(varied), adapter).eval(), tokens)
    torch.testing.assert_close(answers(load(out), tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_llama_cpp_computes_the_same(varied: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    adapter, out = lora(tmp_path / "lora", varied), tmp_path / "x.gguf"
    report = export(varied, "--format", "gguf", "--out", out, "--quantize", "f32", "--adapter", adapter)
    assert report["llama_cpp"]["logit_difference"] < 5e-3
    assert report["architecture"] == ("qwen3" if varied.name.startswith("qwen3") else "deci")
    assert report["filled_blocks"] == ([1, 2, 3] if varied.name.startswith("qwen3") else [2])
    tokens = random_tokens(1, 48)
    expected = answers(PeftModel.from_pretrained(load(varied), adapter).eval(), tokens)[0]
    with llamacpp.opened(out, context=64, precise=True) as model:
        assert relative_difference(llamacpp.logits(model, tokens[0].tolist()), expected) < 1e-5


def test_equal_blocks_that_all_lack_something_are_written(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama", grouped=True, blocks=2))
    heads = torch.ones(checkpoint.shape.heads, dtype=torch.bool)
    masks = Masks((BlockMask(heads, torch.zeros(checkpoint.shape.channels, dtype=torch.bool)),) * 2)
    directory = tmp_path / "cut"
    directory.mkdir()
    write_cut(directory, checkpoint, masks)
    report = export(directory, "--format", "gguf", "--out", tmp_path / "x.gguf")
    assert report["architecture"] == "deci"
    assert report["filled_blocks"] == [0, 1]
    assert field_of(tmp_path / "x.gguf", "deci.feed_forward_length") == [32, 32]
