"""Units of zeros that make a block fit an architecture, without a change in what it computes.

A head whose column of the output projection is zero adds nothing, and neither does a channel. llama.cpp needs them in
two cases. Architectures with one size for all blocks get every block filled up to the widest. `deci` takes blocks as
they are, but for two traps: it drops the attention of a block without feed-forward layer, and it reads the size of a
head from block 0, which so must have one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import UnexportableError
from spinecli.export.architecture import Architecture

FILLED_CHANNELS = 32
"""Channels of zeros in place of a missing feed-forward layer: one row of the smallest quantised types."""


def filled_shapes(shapes: Sequence[BlockShape], architecture: Architecture, d_model: int) -> tuple[BlockShape, ...]:
    """The shapes that the blocks are written in, each at least as large as the block.

    Raises: UnexportableError if the blocks group their queries differently and the architecture has one size for all.
    """
    groups = sorted({shape.group_size for shape in shapes if shape.heads})
    if architecture.per_block:
        return tuple(_present(shape, index, groups[0] if groups else 1) for index, shape in enumerate(shapes))
    if len(groups) > 1:
        raise UnexportableError(
            f"llama.cpp's {architecture.name} has one number of query heads per KV head for all blocks, and these have "
            f"{', '.join(map(str, groups))}"
        )
    head_dim, group = shapes[0].head_dim, groups[0] if groups else 1
    kv_heads = max(1, *(shape.kv_heads for shape in shapes))
    if architecture.square_attention:
        kv_heads = d_model // head_dim // group
        if kv_heads * group * head_dim != d_model:
            raise UnexportableError(
                f"llama.cpp's {architecture.name} wants heads that fill {d_model} dimensions, and heads of {head_dim} "
                "do not"
            )
    if architecture.fixed_heads and any(shape.kv_heads != kv_heads for shape in shapes):
        raise UnexportableError(
            f"llama.cpp's {architecture.name} has {kv_heads} heads in every block, and these have fewer"
        )
    channels = max(shape.channels for shape in shapes) or FILLED_CHANNELS
    return (BlockShape(kv_heads * group, kv_heads, head_dim, channels),) * len(shapes)


def _present(shape: BlockShape, index: int, group: int) -> BlockShape:
    heads, kv_heads = shape.heads, shape.kv_heads
    if index == 0 and not heads:
        heads, kv_heads = group, 1
    return BlockShape(heads, kv_heads, shape.head_dim, shape.channels or FILLED_CHANNELS)


def unit_axis(family: Family, module: str, shape: BlockShape) -> tuple[int, int] | None:
    """Along which axis of a projection its units lie, and how many rows or columns a block of `shape` has there.

    A part of a fused projection is named as `block_modules` names it.
    """
    attention, inputs = family.attention, family.feed_forward.inputs
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    query, key, value = attention.query, attention.key, attention.value
    if attention.fused:
        query, key, value = f"{query}.query", f"{key}.key", f"{value}.value"
    if len(set(inputs)) < len(inputs):
        inputs = tuple(f"{name}.{part}" for part, name in enumerate(inputs))
    sizes = {
        **dict.fromkeys(inputs, (0, shape.channels)),
        family.feed_forward.output: (1, shape.channels),
        query: (0, queries),
        key: (0, keys),
        value: (0, keys),
        attention.output: (1, queries),
    }
    return sizes.get(module)


def filled(value: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with zeros behind it along `axis`, up to `size`."""
    missing = size - value.shape[axis]
    if not missing:
        return value
    shape = list(value.shape)
    shape[axis] = missing
    return torch.cat((value, value.new_zeros(shape)), dim=axis)
