"""The tensors of a GGUF file: their names there, their shapes, and how each is made from the checkpoint.

Units of zeros that make a block fit an architecture, without a change in what it computes.

A head whose column of the output projection is zero adds nothing, and neither does a channel. llama.cpp needs them in
two cases. Architectures with one size for all blocks get every block filled up to the widest. `deci` takes blocks as
they are, but for two traps: it drops the attention of a block without feed-forward layer, and it reads the size of a
head from block 0, which so must have one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Family
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import UnexportableError
from spinecli.exports.architecture import Architecture, Change


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of the checkpoint, or some rows of one."""

    checkpoint: Checkpoint
    name: str
    transposed: bool
    """It is stored as (d_in, d_out)."""
    rows: tuple[int, int] | None
    """First and behind the last, after the transposition; None for all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """After transposition and cut."""
        shape = self.checkpoint.tensors[self.name].shape
        if self.transposed:
            shape = shape[::-1]
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    def read(self) -> Tensor:
        """The values."""
        value = self.checkpoint.read(self.name)
        if self.transposed:
            value = value.T
        return value if self.rows is None else value[slice(*self.rows)]


def block_modules(checkpoint: Checkpoint, index: int, whole: Collection[str]) -> dict[str, dict[str, BlockTensor]]:
    """Module of block `index` -> kind of tensor (weight, bias) -> where it comes from.

    Args:
        whole: fused projections that are not split.
    """
    family = checkpoint.family
    found: dict[str, dict[str, BlockTensor]] = {}
    for relative, name in checkpoint.block_names(index).items():
        module, _, kind = relative.rpartition(".")
        transposed = family.transposed and kind == "weight" and module in family.projections
        parts = {} if module in whole else _parts(checkpoint, index, module)
        pieces: dict[str, tuple[int, int] | None] = {**parts} or {module: None}
        for part, rows in pieces.items():
            found.setdefault(part, {})[kind] = BlockTensor(checkpoint, name, transposed, rows)
    return found


def _parts(checkpoint: Checkpoint, index: int, module: str) -> dict[str, tuple[int, int]]:
    """Rows of the parts of a fused projection that lie one below the other; empty for any other module."""
    attention, inputs = checkpoint.family.attention, checkpoint.family.feed_forward.inputs
    shape = checkpoint.shapes[index]
    if attention.fused == "by part" and module == attention.query:
        keys = shape.kv_heads * shape.head_dim
        sizes = {"query": shape.heads * shape.head_dim, "key": keys, "value": keys}
    elif inputs.count(module) > 1:
        sizes = {str(part): shape.channels for part in range(inputs.count(module))}
    else:
        return {}
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[f"{module}.{part}"] = (start, start + size)
        start += size
    return parts


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
                f"llama.cpp's {architecture.name} requires heads that fill {d_model} dimensions, and heads of "
                f"{head_dim} do not"
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


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, whose value is made when its turn to be written comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """In any floating dtype."""
    exact: bool = False
    """It must not be rounded."""


def lay_out(
    checkpoint: Checkpoint, architecture: Architecture, shapes: Sequence[BlockShape], rope_factors: Tensor | None = None
) -> list[GgufTensor]:
    """All tensors of the file in their order: those outside the blocks, then block by block.

    Args:
        shapes: what the blocks are filled up to, see `filled_shapes`.
        rope_factors: written as `rope_freqs`.

    Raises: UnexportableError if a tensor of the checkpoint has no place in the architecture.
    """
    tensors = []
    targets = set()
    for name in checkpoint.outer_names():
        module, _, kind = name.rpartition(".")
        target = architecture.outer.get(module)
        if target is None or (kind == "bias" and module not in architecture.biases):
            raise _homeless(checkpoint, architecture, name)
        change = architecture.changes.get(module)
        make = partial(_outer, checkpoint, name, change)
        written = f"{target}.{kind}"
        exact = written in architecture.float32
        tensors.append(GgufTensor(written, checkpoint.tensors[name].shape, make, exact))
        targets.add(written)
    if architecture.copied_head and "output.weight" not in targets:
        embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        tensors.append(replace(embedding, name="output.weight"))
    if rope_factors is not None:
        tensors.append(GgufTensor("rope_freqs.weight", tuple(rope_factors.shape), lambda: rope_factors))
    for index, shape in enumerate(shapes):
        tensors += _block(checkpoint, architecture, index, shape)
    return tensors


def _block(checkpoint: Checkpoint, architecture: Architecture, index: int, shape: BlockShape) -> list[GgufTensor]:
    """The tensors of one block, written as a block of `shape`."""
    modules = block_modules(checkpoint, index, architecture.block)
    left_out = _absent_modules(checkpoint, architecture, shape)
    tensors = []
    for module, stored in modules.items():
        target = architecture.target(module)
        for kind, source in stored.items():
            if target is None or (kind == "bias" and not _may_have_bias(architecture, module)):
                raise _homeless(checkpoint, architecture, source.name)
            if module in left_out:
                continue
            units = unit_axis(checkpoint.family, module, shape)
            grown = None if units is None or (kind == "bias" and units[0] == 1) else units
            size = list(source.shape)
            if grown:
                size[grown[0]] = grown[1]
            make = partial(_made, source, architecture.changes.get(module), shape.head_dim, grown)
            tensors.append(GgufTensor(f"blk.{index}.{target}.{kind}", tuple(size), make))
    for module, target in architecture.block.items():
        if module not in modules and module not in left_out:
            tensors += _missing(checkpoint, architecture, module, f"blk.{index}.{target}.weight", shape)
    return tensors


def _missing(
    checkpoint: Checkpoint, architecture: Architecture, module: str, name: str, shape: BlockShape
) -> list[GgufTensor]:
    """The weight of a module that a block has lost and must be written with: zeros, or ones in a norm."""
    units, width = unit_axis(checkpoint.family, module, shape), checkpoint.d_model
    if units is not None:
        size = (units[1], width) if units[0] == 0 else (width, units[1])
        return [GgufTensor(name, size, partial(torch.zeros, size))]
    if module in (*architecture.attention_norms, *architecture.feed_forward_norms):
        of_norm = _shape_elsewhere(checkpoint, module)
        return [GgufTensor(name, of_norm, partial(torch.ones, of_norm))]
    return []


def _absent_modules(checkpoint: Checkpoint, architecture: Architecture, shape: BlockShape) -> set[str]:
    """Modules that a block of `shape` is written without."""
    if shape.heads:
        return set()
    return {*checkpoint.family.attention.projections, *architecture.attention_norms}


def _may_have_bias(architecture: Architecture, module: str) -> bool:
    return module in (*architecture.biases, *architecture.attention_norms, *architecture.feed_forward_norms)


def _shape_elsewhere(checkpoint: Checkpoint, module: str) -> tuple[int, ...]:
    """The shape that a norm has in the first block that has it; its values do not matter where it is filled in."""
    for index in range(checkpoint.blocks):
        if stored := checkpoint.tensors.get(f"{checkpoint.block_prefix(index)}{module}.weight"):
            return stored.shape
    return (checkpoint.d_model,)


def _outer(checkpoint: Checkpoint, name: str, change: Change | None) -> Tensor:
    value = checkpoint.read(name)
    return value if change is None else changed(value, change, 1)


def _made(source: BlockTensor, change: Change | None, head_dim: int, grown: tuple[int, int] | None) -> Tensor:
    value = source.read()
    if grown:
        value = filled(value, *grown)
    return value if change is None else changed(value, change, head_dim)


def changed(value: Tensor, change: Change, head_dim: int) -> Tensor:
    """The tensor as llama.cpp wants it; see `Change`."""
    if change is Change.plus_one:
        return value.float() + 1.0
    if change is Change.by_part:
        heads = value.reshape(-1, 3, head_dim, *value.shape[1:])
        return heads.transpose(0, 1).reshape(value.shape)
    halves = value.reshape(-1, 2, head_dim // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def _homeless(checkpoint: Checkpoint, architecture: Architecture, name: str) -> UnexportableError:
    return UnexportableError(
        f"has the tensor {name}, for which llama.cpp's {architecture.name} has no place", checkpoint.path
    )
