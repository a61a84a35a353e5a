"""The tensors of a GGUF file: their names there, their shapes, and how each is made from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import UnexportableError
from spinecli.export.architecture import Architecture, Change
from spinecli.export.block_filling import filled, unit_axis
from spinecli.export.block_modules import Source, block_modules


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


def _made(source: Source, change: Change | None, head_dim: int, grown: tuple[int, int] | None) -> Tensor:
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
