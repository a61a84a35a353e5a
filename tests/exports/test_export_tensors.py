from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_cases import EXPORTED, LLAMA3, field_of, scaled, tensors_of, uneven, written_gguf
from families import HIDDEN, POSITIONS, VOCABULARY, Recipe, recipe
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import UnexportableError
from spinecli.exports.architecture import Change
from spinecli.exports.config import Quantization
from spinecli.exports.layout import changed

Opened = Callable[[Recipe], Checkpoint]
PLAIN = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    block = name.removeprefix("model.layers.").partition(".")[0]
    prefix = f"blk.{block}." if name.startswith("model.layers.") else ""
    (target,) = [short for long, short in PLAIN.items() if f".{long}." in f".{name}"]
    return f"{prefix}{target}.{name.rpartition('.')[2]}"


def halves_from_pairs(value: Tensor, head_dim: int) -> Tensor:
    """The inverse of the order of rows that llama.cpp wants."""
    heads = value.reshape(-1, head_dim // 2, 2, *value.shape[1:])
    return heads.transpose(1, 2).reshape(value.shape)


@pytest.mark.parametrize("name", ["llama", "llama grouped tied", "llama biases", "llama wide heads", "qwen2", "qwen3"])
def test_every_tensor_is_there_with_its_values(opened: Opened, tmp_path: Path, name: str) -> None:
    made, architecture = EXPORTED[name]
    checkpoint = opened(made)
    written_gguf(tmp_path / "x.gguf", checkpoint)
    found = tensors_of(tmp_path / "x.gguf")
    expected = {gguf_name(each): checkpoint.read(each) for each in checkpoint.tensors}
    assert found.keys() == expected.keys()
    for each, value in expected.items():
        stored = found[each]
        if architecture == "llama" and (".attn_q." in each or ".attn_k." in each):
            assert not torch.equal(stored, value)
            stored = halves_from_pairs(stored, checkpoint.shape.head_dim)
        assert torch.equal(stored, value), each


def test_rows_in_pairs_and_back() -> None:
    value = torch.arange(24.0).reshape(12, 2)
    moved = changed(value, Change.interleaved, 6)
    assert moved[:6, 0].tolist() == [0, 6, 2, 8, 4, 10]  # rows 0 3 1 4 2 5 of the first head
    assert torch.equal(halves_from_pairs(moved, 6), value)


def test_fused_heads_come_out_part_by_part() -> None:
    value = torch.arange(2 * 3 * 2).float()[:, None]  # two heads of two dimensions
    assert changed(value, Change.by_part, 2).flatten().tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_the_header_says_what_the_configuration_says(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama", grouped=True, extra=(("head_dim", 12), ("rms_norm_eps", 3e-5))))
    path = tmp_path / "x.gguf"
    written_gguf(path, checkpoint)
    wanted = {
        "general.architecture": "llama",
        "general.name": checkpoint.path.name,
        "general.file_type": 0,
        "llama.vocab_size": VOCABULARY,
        "llama.context_length": POSITIONS,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": 3,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 12,
        "llama.attention.value_length": 12,
        "llama.rope.dimension_count": 12,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }
    assert {key: field_of(path, key) for key in wanted} == wanted
    assert field_of(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(3e-5)


def test_rotary_scaling_is_written(opened: Opened, tmp_path: Path) -> None:
    yarn, _ = EXPORTED["llama yarn"]
    path = tmp_path / "x.gguf"
    written_gguf(path, opened(yarn))
    assert field_of(path, "llama.rope.scaling.type") == "yarn"
    assert field_of(path, "llama.rope.scaling.original_context_length") == 32
    written_gguf(path, opened(scaled("llama", LLAMA3)))
    factors = tensors_of(path)["rope_freqs.weight"]
    assert factors.shape == (4,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0


def test_a_window_limits_the_context(opened: Opened, tmp_path: Path) -> None:
    made, _ = EXPORTED["mistral window"]
    path = tmp_path / "x.gguf"
    written_gguf(path, opened(made))
    assert field_of(path, "llama.context_length") == 6


REFUSED = {
    "another task": (recipe("llama", task="classification"), "classification"),
    "a family that llama.cpp has not": (recipe("opt", tied=True), "opt"),
    "another rotary scaling": (scaled("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
    "a scaling that this architecture has not": (scaled("qwen3", LLAMA3), "llama3"),
    "a variant of yarn": (
        scaled("llama", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "truncate": False}),
        "truncate",
    ),
    "part of each head": (recipe("phi3", extra=(("partial_rotary_factor", 0.75),)), "6 of the 8"),
    "another activation": (recipe("llama", extra=(("hidden_act", "gelu"),)), "hidden_act"),
    "another scale of attention": (recipe("gemma2", tied=True), "query_pre_attn_scalar"),
    "a head of its own": (recipe("gemma"), "tie_word_embeddings"),
    "blocks without rotation elsewhere": (recipe("smollm3", extra=(("no_rope_layers", [1, 0, 1]),)), "no_rope_layers"),
    "a bias that has no place": (recipe("olmo2", extra=(("attention_bias", True),)), "q_proj.bias"),
}


@pytest.mark.parametrize(("made", "word"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path: Path, made: Recipe, word: str) -> None:
    checkpoint = Checkpoint.open(made.write(tmp_path / "checkpoint"))
    with pytest.raises(UnexportableError, match=word):
        written_gguf(tmp_path / "x.gguf", checkpoint)
    assert not (tmp_path / "x.gguf").exists()


KEPT = [((0, 1), range(40)), ((1,), range(5, 29)), ((0,), ()), ((), range(40))]


def test_blocks_of_their_own_size_are_written_as_they_are(opened: Opened, tmp_path: Path) -> None:
    checkpoint = uneven(opened(recipe("llama", grouped=True, blocks=4)), KEPT)
    path = tmp_path / "x.gguf"
    written_gguf(path, checkpoint)
    assert field_of(path, "general.architecture") == "deci"
    assert field_of(path, "deci.attention.head_count") == [4, 2, 2, 0]
    assert field_of(path, "deci.attention.head_count_kv") == [2, 1, 1, 0]
    assert field_of(path, "deci.feed_forward_length") == [40, 24, 32, 40]
    found = tensors_of(path)
    assert found["blk.1.ffn_down.weight"].shape == (HIDDEN, 24)
    assert torch.equal(found["blk.1.ffn_down.weight"], checkpoint.read("model.layers.1.mlp.down_proj.weight"))
    assert not [name for name in found if name.startswith("blk.3.attn")]


def test_the_feed_forward_layer_that_llama_cpp_needs_is_of_zeros(opened: Opened, tmp_path: Path) -> None:
    checkpoint = uneven(opened(recipe("llama", grouped=True, blocks=4)), KEPT)
    written_gguf(tmp_path / "x.gguf", checkpoint)
    found = tensors_of(tmp_path / "x.gguf")
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        assert found[f"blk.2.{name}.weight"].numel() == 32 * HIDDEN
        assert not found[f"blk.2.{name}.weight"].any()
    assert found["blk.2.ffn_norm.weight"].shape == (HIDDEN,)


def test_the_first_block_gets_a_group_of_zeros_if_it_has_none(opened: Opened, tmp_path: Path) -> None:
    dense = opened(recipe("llama", grouped=True, blocks=2))
    checkpoint = uneven(dense, [((), range(40)), ((0, 1), range(40))])
    path = tmp_path / "x.gguf"
    written_gguf(path, checkpoint)
    assert field_of(path, "deci.attention.head_count") == [2, 4]
    assert not tensors_of(path)["blk.0.attn_output.weight"].any()


def test_an_architecture_of_one_size_is_filled_up_to_the_widest_block(opened: Opened, tmp_path: Path) -> None:
    checkpoint = uneven(opened(recipe("qwen3", grouped=True, blocks=2)), [((1,), range(8)), ((0,), range(16))])
    path = tmp_path / "x.gguf"
    written_gguf(path, checkpoint, Quantization.f32)
    assert field_of(path, "qwen3.attention.head_count") == 2
    assert field_of(path, "qwen3.feed_forward_length") == 16
    down = tensors_of(path)["blk.0.ffn_down.weight"]
    assert torch.equal(down[:, :8], checkpoint.read("model.layers.0.mlp.down_proj.weight"))
    assert not down[:, 8:].any()
