"""Tiny checkpoints on their way to GGUF, and readers of what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from families import Recipe, recipe, tokenizer
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.tensors import held
from spinecli.exports.config import Quantization
from spinecli.exports.gguf_file import GgufModel, write_gguf
from spinecli.exports.gguf_model import gguf_model


class Rope(dict[str, object]):
    """Rotary parameters as part of a recipe, which must be hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items(), key=str)))


ROPE = {"original_max_position_embeddings": 32, "rope_theta": 5000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
YARN = {"rope_type": "yarn", "factor": 4.0, **ROPE}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
WINDOW = ("sliding_window", 6)
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
}


def scaled(family: str, rope: dict[str, object], **changes: object) -> Recipe:
    """A recipe with other rotary parameters."""
    return recipe(family, grouped=True, extra=(("rope_parameters", Rope(rope)),), **changes)


# name -> recipe and the architecture that it is written as
EXPORTED: dict[str, tuple[Recipe, str]] = {
    "llama": (recipe("llama"), "llama"),
    "llama grouped tied": (recipe("llama", grouped=True, tied=True), "llama"),
    "llama biases": (recipe("llama", extra=(("attention_bias", True), ("mlp_bias", True))), "llama"),
    "llama wide heads": (recipe("llama", grouped=True, extra=(("head_dim", 12),)), "llama"),
    "llama bfloat16": (recipe("llama", dtype="bfloat16"), "llama"),
    "llama linear": (scaled("llama", LINEAR), "llama"),
    "llama yarn": (scaled("llama", {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}), "llama"),
    "llama llama3": (scaled("llama", LLAMA3), "llama"),
    "mistral": (recipe("mistral", grouped=True), "llama"),
    "mistral window": (recipe("mistral", grouped=True, extra=(WINDOW,)), "llama"),
    "qwen2": (recipe("qwen2", grouped=True, tied=True), "qwen2"),
    "qwen2 yarn": (scaled("qwen2", YARN), "qwen2"),
    "qwen2 fewer heads": (Recipe("qwen2", heads=3, kv_heads=3), "llama"),
    "qwen3": (recipe("qwen3", grouped=True), "qwen3"),
    "gemma": (recipe("gemma", grouped=True, tied=True), "gemma"),
    "gemma2": (
        recipe("gemma2", grouped=True, tied=True, extra=(("query_pre_attn_scalar", 8), WINDOW)),
        "gemma2",
    ),
    "gemma3": (
        recipe(
            "gemma3_text",
            grouped=True,
            extra=(("query_pre_attn_scalar", 8), WINDOW, ("rope_parameters", Rope(GEMMA3_ROPE))),
        ),
        "gemma3",
    ),
    "phi3": (recipe("phi3", grouped=True), "llama"),
    "phi3 fewer heads": (Recipe("phi3", heads=3, kv_heads=3), "llama"),
    "olmo2": (recipe("olmo2", grouped=True), "olmo2"),
    "olmo2 tied": (recipe("olmo2", tied=True), "olmo2"),
    "smollm3": (recipe("smollm3", grouped=True, tied=True, blocks=5), "smollm3"),
    "gpt2": (recipe("gpt2", tied=True), "gpt2"),
    "gpt_neox": (recipe("gpt_neox"), "gptneox"),
}


def written_gguf(path: Path, checkpoint: Checkpoint, quantization: Quantization = Quantization.f32) -> GgufModel:
    """Write `checkpoint` with the tiny tokenizer."""
    model, _ = gguf_model(checkpoint, tokenizer(), quantization)
    write_gguf(path, model)
    return model


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file in float32, in torch's order of axes."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(size) for size in tensor.shape[::-1]]
        found[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
    return found


def field_of(path: Path, key: str) -> object:
    """A value of a file's header; None if it is not there."""
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def uneven(checkpoint: Checkpoint, kept: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Checkpoint:
    """A checkpoint of the Llama kind of which each block keeps the named KV groups and channels.

    A block without groups or channels loses that sub-layer and its norm.
    """
    dense, family = checkpoint.shape, checkpoint.family
    tensors = {name: checkpoint.tensors[name] for name in checkpoint.outer_names()}
    shapes = []
    for index, (groups, channels) in enumerate(kept):
        keys = [row for group in groups for row in range(group * dense.head_dim, (group + 1) * dense.head_dim)]
        width = dense.head_dim * dense.group_size
        queries = [row for group in groups for row in range(group * width, (group + 1) * width)]
        rows = {
            family.attention.query: (0, queries),
            family.attention.key: (0, keys),
            family.attention.value: (0, keys),
            family.attention.output: (1, queries),
            **dict.fromkeys(family.feed_forward.inputs, (0, list(channels))),
            family.feed_forward.output: (1, list(channels)),
        }
        gone = [] if groups else [*family.attention.projections, "input_layernorm"]
        gone += [] if channels else [*family.feed_forward.inputs, family.feed_forward.output]
        gone += [] if channels else ["post_attention_layernorm"]
        for relative, name in checkpoint.block_names(index).items():
            module, _, kind = relative.rpartition(".")
            if module in gone:
                continue
            value = checkpoint.read(name)
            if module in rows and not (kind == "bias" and rows[module][0] == 1):
                axis, indices = rows[module]
                value = value.index_select(axis, torch.tensor(indices))
            tensors[name] = held(value)
        shapes.append(BlockShape(len(groups) * dense.group_size, len(groups), dense.head_dim, len(channels)))
    changed = replace(checkpoint, tensors=tensors)
    vars(changed)["shapes"] = tuple(shapes)
    return changed


@torch.no_grad()
def silenced_logits(
    checkpoint: Checkpoint, kept: Sequence[tuple[Sequence[int], Sequence[int]]], tokens: Tensor
) -> Tensor:
    """What the dense model answers if the columns of all other units in the output projections are zero."""
    from families import answers, load

    model = load(checkpoint.path)
    dense, family = checkpoint.shape, checkpoint.family
    blocks = model.get_submodule(checkpoint.blocks_path)
    for index, (groups, channels) in enumerate(kept):
        width = dense.head_dim * dense.group_size
        attention = blocks[index].get_submodule(family.attention.output).weight
        feed_forward = blocks[index].get_submodule(family.feed_forward.output).weight
        for group in set(range(dense.kv_heads)) - set(groups):
            attention[:, group * width : (group + 1) * width] = 0
        feed_forward[:, sorted(set(range(dense.channels)) - set(channels))] = 0
    return answers(model, tokens)
