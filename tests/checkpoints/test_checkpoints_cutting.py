"""A cut checkpoint computes what the dense model computes with the removed units silenced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import UNGROUPED, VARIANTS, Recipe, answers, load, random_tokens, recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import cut_config, cut_tensor, head_counts, kept_rows, write_cut
from spinecli.checkpoints.family import families
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import Heads
from spinecli.checkpoints.tensors import SINGLE_FILE
from spinecli.errors import OptionError

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(2, 12)


def cut(checkpoint: Checkpoint, masks: Masks, directory: Path) -> PreTrainedModel:
    directory.mkdir(parents=True)
    write_cut(directory, checkpoint, masks)
    return load(directory)


def logits_of(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return answers(model, tokens)


OUTPUTS = {
    "opt": ("self_attn.out_proj", "fc2"),
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


class Frozen(dict[str, Any]):
    """A part of a configuration that a recipe can be hashed with."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(str(self))


BLOCKS = ("encoder.layer", "decoder.layers", "transformer.layer", "layers", "h")


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    base = model.base_model
    return next(part for name in BLOCKS if (part := _part(base, name)))


def _part(model: nn.Module, name: str) -> nn.ModuleList | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def silenced(directory: Path, masks: Masks, head_dim: int) -> PreTrainedModel:
    """The whole dense model by transformers, with columns zeroed and removed blocks handing on their inputs."""
    model = load(directory)
    family = model.config.model_type.removeprefix("narrow_")
    outputs = OUTPUTS.get(family, ("self_attn.o_proj", "mlp.down_proj"))

    def pass_by(_: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any], output: Any) -> Any:
        hidden = inputs[0] if inputs else arguments["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    for block, mask in zip(blocks_of(model), masks.blocks, strict=True):
        if not mask.heads.any() and not mask.channels.any():
            block.register_forward_hook(pass_by, with_kwargs=True)
            continue
        attention, feed_forward = (block.get_submodule(name) for name in outputs)
        weights = (attention.weight, feed_forward.weight)
        columns, channels = (weight.T if family == "gpt2" else weight for weight in weights)
        with torch.no_grad():
            for head in (~mask.heads).nonzero().flatten().tolist():
                columns[:, head * head_dim : (head + 1) * head_dim] = 0
            channels[:, ~mask.channels] = 0
    return model


def random_masks(
    checkpoint: Checkpoint, kv_heads: int, channels: int, removed: tuple[int, ...], seed: int = 0
) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shape = checkpoint.shape

    def some(count: int, of: int) -> Tensor:
        kept = torch.zeros(of, dtype=torch.bool)
        kept[torch.randperm(of, generator=generator)[:count]] = True
        return kept

    def block(index: int) -> BlockMask:
        if index in removed:
            return BlockMask(torch.zeros(shape.heads, dtype=torch.bool), torch.zeros(shape.channels, dtype=torch.bool))
        heads = some(kv_heads, shape.kv_heads).repeat_interleave(shape.group_size)
        return BlockMask(heads, some(channels, shape.channels))

    return Masks(tuple(block(index) for index in range(checkpoint.blocks)))


def fewer_heads(checkpoint: Checkpoint) -> int:
    allowed = [count // checkpoint.shape.group_size for count in head_counts(checkpoint)]
    return allowed[1] if len(allowed) > 1 else allowed[0]


GRID = [
    pytest.param(recipe(family, grouped=tied and family not in UNGROUPED, tied=tied), id=f"{family} {'tied' * tied}")
    for family in families()
    for tied in (False, True)
]
SPECIAL = [pytest.param(made, id=name) for name, made in VARIANTS.items() if made.extra or made.task != "causal-lm"]


@pytest.mark.parametrize("removed", [(), (1,)], ids=["all blocks", "block 1 out"])
@pytest.mark.parametrize("made", [*GRID, *SPECIAL])
def test_cut_equals_masked(opened: Opened, tmp_path: Path, made: Recipe, removed: tuple[int, ...]) -> None:
    checkpoint = opened(made)
    masks = random_masks(checkpoint, fewer_heads(checkpoint), 24, removed)
    expected = logits_of(silenced(checkpoint.path, masks, checkpoint.shape.head_dim))
    found = logits_of(cut(checkpoint, masks, tmp_path / "cut"))
    assert expected.std() > 0.1  # a model whose logits are all alike would prove nothing
    assert (expected - logits_of(load(checkpoint.path))).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "narrow_bert"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_uniform_masks_cut_exactly(
    opened: Opened, tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    checkpoint = opened(recipe(family, grouped=data.draw(st.booleans(), label="grouped")))
    shape = checkpoint.shape
    kv_heads = data.draw(st.integers(1, shape.kv_heads), label="kv heads")
    channels = data.draw(st.integers(1, shape.channels), label="channels")
    removed = data.draw(st.sets(st.integers(0, checkpoint.blocks - 1), max_size=checkpoint.blocks - 1), label="removed")
    masks = random_masks(checkpoint, kv_heads, channels, tuple(removed), data.draw(st.integers(0, 99), label="seed"))
    expected = logits_of(silenced(checkpoint.path, masks, shape.head_dim))
    found = logits_of(cut(checkpoint, masks, tmp_path_factory.mktemp("cut") / "out"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_query_heads_leave_a_group_evenly(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("qwen2", grouped=True))
    one_of_two = BlockMask(torch.tensor([True, False, False, True]), torch.ones(40, dtype=torch.bool))
    masks = Masks((one_of_two,) * checkpoint.blocks)
    expected = logits_of(silenced(checkpoint.path, masks, checkpoint.shape.head_dim))
    model = cut(checkpoint, masks, tmp_path / "cut")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


def test_full_masks_copy_the_checkpoint(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama", grouped=True, dtype="bfloat16"))
    model = cut(checkpoint, Masks.full((checkpoint.shape,) * checkpoint.blocks), tmp_path / "cut")
    dense = load(checkpoint.path).state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_dtypes_survive_the_cut(opened: Opened, tmp_path: Path, dtype: str) -> None:
    checkpoint = opened(recipe("mistral", grouped=True, dtype=dtype))
    masks = random_masks(checkpoint, 1, 24, (0,))
    model = cut(checkpoint, masks, tmp_path / "cut")
    assert {stored.dtype for stored in Checkpoint.open(tmp_path / "cut").tensors.values()} == {getattr(torch, dtype)}
    expected = logits_of(silenced(checkpoint.path, masks, checkpoint.shape.head_dim))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


def test_heads_that_do_not_divide_the_width_turn_llama_into_mistral(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama"))
    masks = random_masks(checkpoint, 3, 40, ())
    model = cut(checkpoint, masks, tmp_path / "cut")
    assert model.config.model_type == "mistral"
    assert model.config.architectures == ["MistralForCausalLM"]
    assert model.config.sliding_window is None
    assert model.config.num_attention_heads == 3
    expected = logits_of(silenced(checkpoint.path, masks, checkpoint.shape.head_dim))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


def test_heads_that_divide_the_width_stay_llama(opened: Opened) -> None:
    checkpoint = opened(recipe("llama"))
    assert cut_config(checkpoint, random_masks(checkpoint, 2, 40, ()))["model_type"] == "llama"


def test_a_llama_with_biases_keeps_only_head_counts_that_llama_can_express(opened: Opened) -> None:
    assert head_counts(opened(VARIANTS["llama biases"])) == [4, 2, 1]
    assert head_counts(opened(recipe("llama"))) == [4, 3, 2, 1]
    assert head_counts(opened(recipe("llama", grouped=True))) == [4, 2]
    assert head_counts(opened(recipe("qwen3", grouped=True))) == [4, 2]
    assert head_counts(opened(recipe("opt"))) == [4]


def test_heads_stay_where_others_would_change(opened: Opened) -> None:
    assert head_counts(opened(recipe("gemma2"))) == [4, 2, 1]  # its format wants a count that divides the width
    for family in ("olmo2", "gpt2", "gpt_neox", "distilbert"):
        assert head_counts(opened(recipe(family))) == [4]


def test_long_context_factors_keep_the_heads_of_a_phi3(opened: Opened) -> None:
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    checkpoint = opened(recipe("phi3", extra=(("rope_parameters", Frozen(factors)),)))
    assert head_counts(checkpoint) == head_counts(checkpoint, Heads.keep) == [4]
    assert head_counts(opened(recipe("phi3"))) == [4, 3, 2, 1]
    with pytest.raises(OptionError, match="--heads cut is not possible with phi3"):
        head_counts(checkpoint, Heads.cut)


def test_files_call_tensors_as_their_family_does(opened: Opened, tmp_path: Path) -> None:
    """An older transformers would not find the head of a GPT-NeoX under another name."""
    checkpoint = opened(recipe("gpt_neox"))
    cut(checkpoint, random_masks(checkpoint, 4, 24, ()), tmp_path / "cut")
    for place in (checkpoint.path, tmp_path / "cut"):
        names = load_file(place / SINGLE_FILE).keys()
        assert "embed_out.weight" in names
        assert "lm_head.weight" not in names
        assert "lm_head.weight" in Checkpoint.open(place).tensors


def test_channels_that_the_configuration_leaves_out_are_written(opened: Opened, tmp_path: Path) -> None:
    made = recipe("gpt2", channels=128).write(tmp_path / "gpt2")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "n_inner": None}))
    checkpoint = Checkpoint.open(made)
    assert checkpoint.shape.channels == 128
    model = cut(checkpoint, random_masks(checkpoint, 4, 24, ()), tmp_path / "cut")
    assert model.config.n_inner == 24


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_heads_leave_an_encoder_only_if_asked(opened: Opened, family: str) -> None:
    assert head_counts(opened(recipe(family))) == head_counts(opened(recipe(family)), Heads.keep) == [4]
    assert head_counts(opened(recipe(family)), Heads.cut) == [4, 3, 2, 1]
    assert head_counts(opened(recipe(f"narrow_{family}", heads=3))) == [3, 2, 1]


def test_heads_may_be_kept_where_they_could_leave_but_not_cut_where_they_cannot(opened: Opened) -> None:
    assert head_counts(opened(recipe("llama", grouped=True)), Heads.keep) == [4]
    with pytest.raises(OptionError, match="--heads cut is not possible with opt"):
        head_counts(opened(recipe("opt")), Heads.cut)
    with pytest.raises(ValueError, match="no head can leave"):
        cut_config(opened(recipe("opt")), random_masks(opened(recipe("opt")), 3, 40, ()))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_window_kinds_follow_their_blocks(opened: Opened, tmp_path: Path, family: str) -> None:
    windows = (("use_sliding_window", True), ("sliding_window", 6), ("max_window_layers", 2))
    checkpoint = opened(recipe(family, grouped=True, blocks=4, extra=windows))
    assert checkpoint.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    masks = random_masks(checkpoint, 2, 40, (1,))
    model = cut(checkpoint, masks, tmp_path / "cut")
    assert model.config.num_hidden_layers == 3
    assert model.config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    expected = logits_of(silenced(checkpoint.path, masks, checkpoint.shape.head_dim))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [name for name, family in families().items() if family.kind == "causal"])
def test_a_cut_checkpoint_generates(opened: Opened, tmp_path: Path, family: str) -> None:
    checkpoint = opened(recipe(family))
    model = cut(checkpoint, random_masks(checkpoint, fewer_heads(checkpoint), 24, (2,)), tmp_path / "cut")
    prompt = TOKENS[:1, :4]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    without = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    assert with_cache.shape == (1, 10)
    assert torch.equal(with_cache, without)


def test_config_without_kv_heads_gets_them(opened: Opened, tmp_path: Path) -> None:
    """Old Llama configs leave num_key_value_heads and head_dim out; the cut one must say both."""
    old = recipe("llama").write(tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["num_key_value_heads"], config["head_dim"]
    (old / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(old)
    masks = random_masks(checkpoint, 2, 16, ())
    found = cut_config(checkpoint, masks)
    assert (found["num_attention_heads"], found["num_key_value_heads"], found["head_dim"]) == (2, 2, 8)
    expected = logits_of(silenced(old, masks, 8))
    torch.testing.assert_close(logits_of(cut(checkpoint, masks, tmp_path / "cut")), expected, atol=1e-4, rtol=0)


def test_tensors_outside_the_units_come_back_as_they_are(opened: Opened) -> None:
    checkpoint = opened(VARIANTS["llama biases"])
    rows = kept_rows(checkpoint.family, random_masks(checkpoint, 2, 16, ()).blocks[0], checkpoint.shape)
    norm, output_bias, input_bias = torch.randn(32), torch.randn(32), torch.randn(40)
    assert cut_tensor("input_layernorm.weight", norm, rows) is norm
    assert cut_tensor("mlp.down_proj.bias", output_bias, rows) is output_bias
    assert len(cut_tensor("mlp.up_proj.bias", input_bias, rows)) == 16
