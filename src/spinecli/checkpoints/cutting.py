"""Physical cutting: from a checkpoint and masks to a smaller checkpoint, tensor by tensor.

A cut tensor is the dense one with rows (input projections) or columns (output projections) left out, so the smaller
model computes what the dense model computes with the removed units' outputs set to zero.
"""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Family, family_of
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.narrow_registration import auto_map
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.writer import PlannedTensor, write_checkpoint
from spinecli.errors import OptionError
from spinecli.progress import Progress, silent


def head_rows(heads: Tensor, head_dim: int) -> Tensor:
    """Row (or column) indices of the kept heads: (heads,) bool -> (kept * head_dim,) int64."""
    return heads.repeat_interleave(head_dim).nonzero().flatten()


def kept_rows(family: Family, mask: BlockMask, shape: BlockShape) -> dict[str, tuple[int, Tensor]]:
    """For each projection of a block that loses units: relative name -> (axis of the weight, kept indices)."""
    attention, feed_forward = family.attention, family.feed_forward
    query = head_rows(mask.heads, shape.head_dim)
    key_value = head_rows(mask.kv_heads(shape), shape.head_dim)
    channels = mask.channels.nonzero().flatten()
    return {
        **dict.fromkeys(feed_forward.inputs, (0, channels)),
        feed_forward.output: (1, channels),
        attention.query: (0, query),
        attention.key: (0, key_value),
        attention.value: (0, key_value),
        attention.output: (1, query),
    }


def cut_tensor(relative_name: str, value: Tensor, rows: dict[str, tuple[int, Tensor]]) -> Tensor:
    """The kept part of a block's tensor; tensors that belong to no unit come back as they are."""
    projection, _, kind = relative_name.rpartition(".")
    if projection not in rows:
        return value
    axis, kept = rows[projection]
    if kind == "bias":
        return value if axis == 1 else value.index_select(0, kept)
    return value.index_select(axis, kept)


def plan_cut(checkpoint: Checkpoint, masks: Masks) -> list[list[PlannedTensor]]:
    """The tensors of the cut checkpoint, in groups that are written together (outer tensors, then each kept block)."""
    family, shape = checkpoint.family, checkpoint.shape
    groups = [[_copied(checkpoint, name) for name in checkpoint.outer_names()]]
    for new_index, old_index in enumerate(masks.kept_blocks):
        rows = kept_rows(family, masks.blocks[old_index], shape)
        prefix = checkpoint.block_prefix(new_index)
        groups.append(
            [
                _cut(checkpoint, prefix + relative, full, relative, rows)
                for relative, full in checkpoint.block_names(old_index).items()
            ]
        )
    return groups


def write_cut(directory: Path, checkpoint: Checkpoint, masks: Masks, progress: Progress = silent) -> None:
    """Write the cut checkpoint with the dense one's tokenizer, and the masks beside it.

    Raises: NoSpaceError; ValueError if the masks differ in shape or remove heads that cannot leave.
    """
    config = cut_config(checkpoint, masks)
    write_checkpoint(directory, config, plan_cut(checkpoint, masks), checkpoint.path, progress)
    masks.save(directory)


def _copied(checkpoint: Checkpoint, name: str) -> PlannedTensor:
    stored = checkpoint.tensors[name]
    return PlannedTensor(name, stored.shape, stored.dtype, partial(checkpoint.read, name))


def _cut(
    checkpoint: Checkpoint, name: str, source: str, relative: str, rows: dict[str, tuple[int, Tensor]]
) -> PlannedTensor:
    stored = checkpoint.tensors[source]
    shape = cut_tensor(relative, torch.empty(stored.shape, device="meta"), _on_meta(rows)).shape
    return PlannedTensor(
        name, tuple(shape), stored.dtype, lambda: cut_tensor(relative, checkpoint.read(source), rows).contiguous()
    )


def _on_meta(rows: dict[str, tuple[int, Tensor]]) -> dict[str, tuple[int, Tensor]]:
    return {name: (axis, kept.to("meta")) for name, (axis, kept) in rows.items()}


def cut_config(checkpoint: Checkpoint, masks: Masks) -> dict[str, Any]:
    """config.json of the cut checkpoint: the dense one with the new counts.

    A Llama whose kept head count does not divide hidden_size is written as a Mistral without a window, and a BERT or
    RoBERTa with fewer heads as the narrow family that ships its modules; both compute the same. `head_counts` says
    beforehand which counts can be written.

    Raises: ValueError if the masks remove heads that cannot leave.
    """
    shape = masks.uniform_shape(checkpoint.shape)
    family = written_family(checkpoint, shape)
    keys = family.config_keys
    config = dict(checkpoint.raw_config)
    config[keys.blocks] = len(masks.kept_blocks)
    config[keys.channels] = shape.channels
    if family.attention.cuttable:
        config[keys.heads] = shape.heads
        if keys.kv_heads:
            config[keys.kv_heads] = shape.kv_heads
        if keys.head_dim:
            config[keys.head_dim] = shape.head_dim
    layer_types = getattr(checkpoint.config, "layer_types", None)
    if layer_types is not None:
        config["layer_types"] = [layer_types[index] for index in masks.kept_blocks]
    if family is not checkpoint.family:
        if stand := checkpoint.family.indivisible_heads:
            config = {key: value for key, value in config.items() if key not in stand.drop} | stand.set
        config["model_type"], config["architectures"] = family.model_type, [family.architecture_of(checkpoint.task)]
    if family.modelling_file:
        config["auto_map"] = auto_map(family)
    return config


def written_family(checkpoint: Checkpoint, shape: BlockShape) -> Family:
    """The family that a cut to blocks of `shape` is written as; ValueError if the cut cannot be written."""
    family = checkpoint.family
    if not family.attention.cuttable and shape.heads != checkpoint.shape.heads:
        if family.narrow_heads is None:
            raise ValueError(f"no head can leave a {family.model_type}")
        return family_of(family.narrow_heads)
    if family.indivisible_heads is not None and checkpoint.d_model % shape.heads:
        return family_of(family.indivisible_heads.model_type)
    return family


class Heads(str, Enum):
    """Which heads may be cut."""

    auto = "auto"
    """Heads leave where the plain format can carry fewer of them."""
    cut = "cut"
    """Heads leave, even if the checkpoint must ship its modules for that."""
    keep = "keep"
    """All heads stay."""


def head_counts(checkpoint: Checkpoint, heads: Heads = Heads.auto) -> list[int]:
    """Kept query-head counts per block that can be written, falling, whole KV groups only.

    Raises: OptionError if heads are to be cut from a family that no format carries with fewer.
    """
    shape, family, stand = checkpoint.shape, checkpoint.family, checkpoint.family.indivisible_heads
    if heads is Heads.cut and not family.heads_can_leave:
        raise OptionError(
            f"--heads cut is not possible with {family.model_type}, whose modules fix the head size at hidden size / "
            "heads; use --heads keep."
        )
    if heads is Heads.keep or (heads is Heads.auto and not family.attention.cuttable):
        return [shape.heads]
    counts = [groups * shape.group_size for groups in range(shape.kv_heads, 0, -1)]
    stand_possible = stand is not None and not any(checkpoint.raw_config.get(key) for key in stand.unless_set)
    needs_divisor = stand is not None and not stand_possible
    return [count for count in counts if not needs_divisor or checkpoint.d_model % count == 0]
