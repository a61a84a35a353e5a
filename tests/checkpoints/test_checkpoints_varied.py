"""Checkpoints whose blocks differ in width, or lack a sub-layer: exact, and good for all that follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import MIXED_WINDOWS, Recipe, classifier, load, random_tokens, recipe
from peft import LoraConfig, get_peft_model
from test_checkpoints_cutting import cut, logits_of, silenced

from spinecli.checkpoints import modeling_varied
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import size_of
from spinecli.checkpoints.cutting import can_vary
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.verify import streamed_logits

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(2, 12)
SHIPPED = Path(modeling_varied.__file__)
# kept KV groups of 2 and channels of 40, block by block: narrower, shorter, without attention, gone, without the rest
KEPT = ((2, 24), (1, 40), (0, 16), (0, 0), (1, 0))
MADE = {
    "llama": recipe("llama", grouped=True, blocks=5),
    "llama tied": recipe("llama", grouped=True, tied=True, blocks=5, dtype="bfloat16"),
    "mistral window": recipe("mistral", grouped=True, blocks=5, extra=(("sliding_window", 6),)),
    "qwen2 mixed windows": recipe("qwen2", grouped=True, blocks=5, extra=MIXED_WINDOWS),
    "qwen3": recipe("qwen3", grouped=True, blocks=5),
    "llama classifier": classifier("llama", grouped=True, blocks=5),
}

STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.startswith("spinecli") for name in sys.modules)
directory, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
tokens = torch.load(tokens)
with torch.no_grad():
    logits = model(tokens).logits
    texts = [
        model.generate(tokens[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, cache_implementation=cache)
        for cache in (None, "static")
    ]
    slow = tokens[:1]
    for _ in range(8):
        slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    compiled = torch.compile(model, backend="eager")(tokens).logits
torch.save([logits, *texts, slow, compiled], out)
"""


def masks_of(checkpoint: Checkpoint, kept: tuple[tuple[int, int], ...] = KEPT, seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for shape, (groups, channels) in zip(checkpoint.shapes, kept, strict=True):
        heads, feed = torch.zeros(shape.kv_heads, dtype=torch.bool), torch.zeros(shape.channels, dtype=torch.bool)
        heads[torch.randperm(shape.kv_heads, generator=generator)[:groups]] = True
        feed[torch.randperm(shape.channels, generator=generator)[:channels]] = True
        blocks.append(BlockMask(heads.repeat_interleave(shape.group_size), feed))
    return Masks(tuple(blocks))


@pytest.mark.parametrize("name", MADE)
def test_a_varied_cut_computes_what_the_masked_model_does(opened: Opened, tmp_path: Path, name: str) -> None:
    checkpoint = opened(MADE[name])
    masks = masks_of(checkpoint)
    expected = streamed_logits(checkpoint, TOKENS, masks)
    model = cut(checkpoint, masks, tmp_path / "cut")
    written = Checkpoint.open(tmp_path / "cut")
    assert written.shapes == masks.shapes_after(checkpoint.shapes)
    assert [(shape.kv_heads, shape.channels) for shape in written.shapes] == [each for each in KEPT if any(each)]
    tolerance = 0.05 if "tied" in name else 1e-4
    torch.testing.assert_close(streamed_logits(written, TOKENS), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(model).float(), expected, atol=tolerance, rtol=0)
    if "classifier" not in name:
        torch.testing.assert_close(
            logits_of(silenced(checkpoint.path, masks, 8)).float(), expected, atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("name", MADE)
def test_counts_equal_what_the_varied_model_holds(opened: Opened, tmp_path: Path, name: str) -> None:
    checkpoint = opened(MADE[name])
    model = cut(checkpoint, masks_of(checkpoint), tmp_path / "cut")
    written = Checkpoint.open(tmp_path / "cut")
    size = size_of(written, context=16)
    blocks = sum(value.numel() for key, value in model.named_parameters() if ".layers." in key)
    assert size.block_parameters == blocks
    assert size.total_parameters == sum(value.numel() for value in model.parameters())
    assert size.bytes == written.bytes


def test_a_stranger_generates_with_both_caches_and_compiles_it(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(MADE["llama"])
    expected = logits_of(cut(checkpoint, masks_of(checkpoint), tmp_path / "cut"))
    torch.save(TOKENS, tmp_path / "tokens")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", STRANGER, *(str(tmp_path / name) for name in ("cut", "tokens", "found"))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, dynamic, static, slow, compiled = torch.load(tmp_path / "found")
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)
    assert torch.equal(dynamic, slow)
    assert torch.equal(static, slow)


def test_the_shipped_file_is_the_module_that_spine_runs(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(MADE["qwen3"])
    model = cut(checkpoint, masks_of(checkpoint), tmp_path / "cut")
    assert (tmp_path / "cut" / SHIPPED.name).read_bytes() == SHIPPED.read_bytes()
    assert type(model).__module__ == modeling_varied.__name__
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["model_type"] == "varied_qwen3"
    assert config["per_layer_config"]["2"]["skip"] == ["attention"]
    assert config["per_layer_config"]["3"]["skip"] == ["mlp"]


def test_a_varied_checkpoint_can_be_cut_again(opened: Opened, tmp_path: Path) -> None:
    first = opened(MADE["llama"])
    cut(first, masks_of(first), tmp_path / "one")
    second = Checkpoint.open(tmp_path / "one")
    masks = masks_of(second, ((1, 16), (1, 8), (0, 16), (1, 0)), seed=1)
    expected = streamed_logits(second, TOKENS, masks)
    torch.testing.assert_close(logits_of(cut(second, masks, tmp_path / "two")), expected, atol=1e-4, rtol=0)
    copied = cut(second, Masks.full(second.shapes), tmp_path / "copy").state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in load(second.path).state_dict().items())


def test_lora_with_ranks_by_block_fits_it(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(MADE["llama"])
    model = cut(checkpoint, masks_of(checkpoint), tmp_path / "cut")
    before = logits_of(model)
    pattern = {r"layers\.0\..*": 4, r"layers\.1\..*": 2}
    config = LoraConfig(r=1, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern=pattern)
    adapted = get_peft_model(model, config).eval()
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0] == 4
    assert adapted.base_model.model.model.layers[2].mlp.down_proj.lora_A["default"].weight.shape[0] == 1
    torch.testing.assert_close(logits_of(adapted), before)


def test_equal_widths_stay_plain(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(MADE["llama"])
    model = cut(checkpoint, masks_of(checkpoint, ((2, 24),) * 5), tmp_path / "cut")
    assert model.config.model_type == "llama"
    assert not (tmp_path / "cut" / SHIPPED.name).exists()


def test_shapes_of_a_varied_checkpoint_are_no_single_shape(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(MADE["llama"])
    cut(checkpoint, masks_of(checkpoint), tmp_path / "cut")
    written = Checkpoint.open(tmp_path / "cut")
    assert not written.is_uniform
    assert written.shapes[2] == BlockShape(0, 0, 8, 16)
    with pytest.raises(ValueError, match="differ in shape"):
        _ = written.shape


@pytest.mark.parametrize("made", [recipe("opt"), recipe("bert"), recipe("llama", extra=(("mlp_bias", True),))], ids=str)
def test_some_checkpoints_cannot_vary(opened: Opened, tmp_path: Path, made: Recipe) -> None:
    checkpoint = opened(made)
    assert not can_vary(checkpoint)
    masks = Masks.full((*checkpoint.shapes[:2], BlockShape(4, 4, 8, 40)))
    narrow = BlockMask(masks.blocks[2].heads, torch.arange(40) < 8)
    with pytest.raises(ValueError, match="cannot differ in width"):
        cut(checkpoint, Masks((*masks.blocks[:2], narrow)), tmp_path / "cut")
