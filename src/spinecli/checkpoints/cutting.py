"""Physical cutting: from a checkpoint and masks to a smaller checkpoint, tensor by tensor.

A cut tensor is the dense one with rows (input projections) or columns (output projections) left out, so the smaller
model computes what the dense model computes with the removed units' outputs set to zero.

Which rows of a block's input projections belong to which unit, also where several projections are fused into one.

Separate projections have a matrix each. Of fused ones, the rows lie in one matrix in one of two ways:

    by part:  q0 q1 q2 q3 │ k0 k1 │ v0 v1
    by head:  q0 k0 v0 │ q1 k1 v1 │ q2 k2 v2 │ q3 k3 v3
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint, config_from
from spinecli.checkpoints.family import AttentionGroup, Family, FeedForwardGroup, Task, family_of
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape, Heads
from spinecli.checkpoints.skeleton import auto_map
from spinecli.checkpoints.tensors import ComputedTensor, TensorSource
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.errors import OptionError


def attention_rows(attention: AttentionGroup, shape: BlockShape) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the projections named query, key and value, by head.

    Returns: (heads, head_dim), (kv_heads, head_dim) and (kv_heads, head_dim) int64.
    """
    query = torch.arange(shape.heads * shape.head_dim).view(shape.heads, shape.head_dim)
    key = torch.arange(shape.kv_heads * shape.head_dim).view(shape.kv_heads, shape.head_dim)
    if attention.fused == "by head":
        every = torch.arange(3 * query.numel()).view(shape.heads, 3, shape.head_dim)
        return every[:, 0], every[:, 1], every[:, 2]
    if attention.fused == "by part":
        return query, query.numel() + key, query.numel() + key.numel() + key
    return query, key, key


def channel_rows(feed_forward: FeedForwardGroup, shape: BlockShape) -> tuple[Tensor, ...]:
    """Rows of the feed-forward input projections by channel, one (channels,) int64 for each of `inputs`."""
    seen = dict.fromkeys(feed_forward.inputs, 0)
    found = []
    for name in feed_forward.inputs:
        found.append(torch.arange(shape.channels) + seen[name] * shape.channels)
        seen[name] += 1
    return tuple(found)


def head_rows(heads: Tensor, head_dim: int) -> Tensor:
    """Row (or column) indices of the kept heads: (heads,) bool -> (kept * head_dim,) int64."""
    return heads.repeat_interleave(head_dim).nonzero().flatten()


def kept_rows(family: Family, mask: BlockMask, shape: BlockShape) -> dict[str, tuple[int, Tensor]]:
    """For each projection of a block that loses units: relative name -> (axis of the weight, kept indices)."""
    attention, feed_forward = family.attention, family.feed_forward
    heads = (mask.heads, mask.kv_heads(shape), mask.kv_heads(shape))
    names = (attention.query, attention.key, attention.value, *feed_forward.inputs)
    kept = (
        *(rows[stay].flatten() for rows, stay in zip(attention_rows(attention, shape), heads, strict=True)),
        *(rows[mask.channels] for rows in channel_rows(feed_forward, shape)),
    )
    inputs: dict[str, Tensor] = {}
    for name, rows in zip(names, kept, strict=True):
        inputs[name] = torch.cat([inputs[name], rows]).sort().values if name in inputs else rows
    return {
        **{name: (0, rows) for name, rows in inputs.items()},
        attention.output: (1, head_rows(mask.heads, shape.head_dim)),
        feed_forward.output: (1, mask.channels.nonzero().flatten()),
    }


def cut_tensor(
    relative_name: str, value: Tensor, rows: dict[str, tuple[int, Tensor]], *, transposed: bool = False
) -> Tensor:
    """The kept part of a block's tensor; tensors that belong to no unit come back as they are.

    Args:
        rows: from `kept_rows`.
        transposed: weights are stored (d_in, d_out).
    """
    projection, _, kind = relative_name.rpartition(".")
    if projection not in rows:
        return value
    axis, kept = rows[projection]
    if kind == "bias":
        return value if axis == 1 else value.index_select(0, kept)
    return value.index_select(1 - axis if transposed else axis, kept)


def cut_checkpoint(checkpoint: Checkpoint, masks: Masks) -> Checkpoint:
    """The checkpoint that `masks` leave of `checkpoint`; its tensors are cut as they are read, nothing is copied.

    Raises: ValueError if the masks differ in shape or remove heads that cannot leave.
    """
    raw_config = cut_config(checkpoint, masks)
    family = family_of(str(raw_config["model_type"]))
    tensors: dict[str, TensorSource] = {name: checkpoint.tensors[name] for name in checkpoint.outer_names()}
    for new_index, old_index in enumerate(masks.kept_blocks):
        mask, shape = masks.blocks[old_index], checkpoint.shapes[old_index]
        rows = kept_rows(checkpoint.family, mask, shape)
        gone = _gone_modules(checkpoint, mask, shape)
        prefix = checkpoint.block_prefix(new_index)
        for relative, full in checkpoint.block_names(old_index).items():
            if not relative.startswith(gone):
                tensors[prefix + relative] = _cut(checkpoint, full, relative, rows)
    return Checkpoint(checkpoint.path, raw_config, config_from(raw_config), family, checkpoint.task, tensors)


def _gone_modules(checkpoint: Checkpoint, mask: BlockMask, shape: BlockShape) -> tuple[str, ...]:
    """Modules of a block that leave because their sub-layer has lost its last unit."""
    after, sub_layers = mask.shape_after(shape), checkpoint.family.sub_layers
    gone: tuple[str, ...] = ()
    if shape.heads and not after.heads:
        gone += sub_layers["attention"]
    if shape.channels and not after.channels:
        gone += sub_layers["mlp"]
    return gone


def write_cut(directory: Path, checkpoint: Checkpoint, masks: Masks, context: RunContext | None = None) -> None:
    """Write the cut checkpoint with the dense one's tokenizer, and the masks beside it.

    Raises: NoSpaceError; ValueError if the masks differ in shape or remove heads that cannot leave.
    """
    cut = cut_checkpoint(checkpoint, masks)
    write_checkpoint(directory, cut.raw_config, cut.groups(), checkpoint.path, context)
    masks.save(directory)


def _cut(checkpoint: Checkpoint, source: str, relative: str, rows: dict[str, tuple[int, Tensor]]) -> ComputedTensor:
    stored, transposed = checkpoint.tensors[source], checkpoint.family.transposed
    shape = cut_tensor(relative, torch.empty(stored.shape, device="meta"), _on_meta(rows), transposed=transposed).shape

    def make() -> Tensor:
        return cut_tensor(relative, stored.read(), rows, transposed=transposed).contiguous()

    return ComputedTensor(tuple(shape), stored.dtype, make)


def _on_meta(rows: dict[str, tuple[int, Tensor]]) -> dict[str, tuple[int, Tensor]]:
    return {name: (axis, kept.to("meta")) for name, (axis, kept) in rows.items()}


def cut_config(checkpoint: Checkpoint, masks: Masks) -> dict[str, Any]:
    """config.json of the cut checkpoint: the dense one with the new counts.

    A Llama whose kept head count does not divide hidden_size is written as a Mistral without a window, a BERT or
    RoBERTa with fewer heads as the narrow family that ships its modules, and blocks that differ in width as the varied
    family that does; all compute the same. `head_counts` says beforehand which counts can be written.

    Raises: ValueError if the masks ask for what the family cannot carry.
    """
    shapes = masks.shapes_after(checkpoint.shapes)
    family = written_family(checkpoint, shapes)
    keys = family.config_keys
    config = {key: value for key, value in checkpoint.raw_config.items() if key != "per_layer_config"}
    config[keys.blocks] = len(shapes)
    for key in checkpoint.family.block_lists:
        entries = getattr(checkpoint.config, key, None)
        if entries is not None:
            config[key] = [entries[index] for index in masks.kept_blocks]
    if family.modelling_file and family.varied:
        config["per_layer_config"] = {str(index): _differing(family, shape) for index, shape in enumerate(shapes)}
        if keys.head_dim:
            config[keys.head_dim] = shapes[0].head_dim
    else:
        config |= _widths(family, shapes[0])
    if family is not checkpoint.family:
        if stand := checkpoint.family.indivisible_heads:
            config = {key: value for key, value in config.items() if key not in stand.drop} | stand.set
        config["model_type"], config["architectures"] = family.model_type, [family.architecture_of(checkpoint.task)]
    if family.modelling_file:
        config["auto_map"] = auto_map(family)
    return config


def _widths(family: Family, shape: BlockShape) -> dict[str, Any]:
    """The config keys that give every block `shape`."""
    keys = family.config_keys
    found = {keys.channels: shape.channels}
    if family.attention.cuttable:
        found[keys.heads] = shape.heads
        if keys.kv_heads:
            found[keys.kv_heads] = shape.kv_heads
        if keys.head_dim:
            found[keys.head_dim] = shape.head_dim
    return found


def _differing(family: Family, shape: BlockShape) -> dict[str, Any]:
    """An entry of `per_layer_config`: one block's counts, and which of its sub-layers are gone."""
    keys = family.config_keys
    found: dict[str, Any] = {}
    if shape.heads:
        found |= {keys.heads: shape.heads, str(keys.kv_heads): shape.kv_heads}
    if shape.channels:
        found[keys.channels] = shape.channels
    skipped = [name for name, units in (("attention", shape.heads), ("mlp", shape.channels)) if not units]
    return found | ({"skip": skipped} if skipped else {})


def written_family(checkpoint: Checkpoint, shapes: Sequence[BlockShape]) -> Family:
    """The family that a cut to blocks of `shapes` is written as; ValueError if the cut cannot be written."""
    family = checkpoint.family
    if len(set(shapes)) > 1 or family.model_type == family.varied or not (shapes[0].heads and shapes[0].channels):
        if not can_vary(checkpoint):
            raise ValueError(f"the blocks of a {family.model_type} cannot differ in width")
        return family_of(str(family.varied))
    shape = shapes[0]
    if not family.attention.cuttable and shape.heads != checkpoint.shape.heads:
        if family.narrow_heads is None:
            raise ValueError(f"no head can leave a {family.model_type}")
        return family_of(family.narrow_heads)
    if family.indivisible_heads is not None and checkpoint.d_model % shape.heads:
        return family_of(family.indivisible_heads.model_type)
    return family


def can_vary(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint can be written with blocks that differ in width."""
    family, stand = checkpoint.family, checkpoint.family.indivisible_heads
    if family.varied is None or checkpoint.task is Task.encoding:
        return False
    return stand is None or not any(checkpoint.raw_config.get(key) for key in stand.unless_set)


def heads_can_leave(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint can be written with fewer heads at all."""
    family = checkpoint.family
    if not family.heads_can_leave or family.attention.fixed_by is None:
        return family.heads_can_leave
    value: Any = checkpoint.config.to_dict()
    for key in family.attention.fixed_by.split("."):
        value = (value or {}).get(key)
    return value is None


def head_counts(checkpoint: Checkpoint, heads: Heads = Heads.auto) -> list[int]:
    """Kept query-head counts per block that can be written, falling, whole KV groups only.

    Raises: OptionError if heads are to be cut from a family that no format carries with fewer.
    """
    shape, family, stand = checkpoint.shape, checkpoint.family, checkpoint.family.indivisible_heads
    can_leave = heads_can_leave(checkpoint)
    if heads is Heads.cut and not can_leave:
        raise OptionError(
            f"--heads cut is not possible with {family.model_type}, whose modules compute something else with fewer "
            "heads; use --heads keep."
        )
    if heads is Heads.keep or not can_leave or (heads is Heads.auto and not family.attention.cuttable):
        return [shape.heads]
    counts = [groups * shape.group_size for groups in range(shape.kv_heads, 0, -1)]
    stand_possible = stand is not None and not any(checkpoint.raw_config.get(key) for key in stand.unless_set)
    needs_divisor = family.attention.divides_width or (stand is not None and not stand_possible)
    return [count for count in counts if not needs_divisor or checkpoint.d_model % count == 0]
