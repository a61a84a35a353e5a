"""Parameters, multiply-adds and bytes, counted from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.shape import BlockShape


@dataclass(frozen=True)
class BlockCosts:
    """Parameters of a block and of the units that can leave it."""

    block: int
    kv_group: int
    """One KV head with its query heads, over all attention projections; 0 if heads cannot leave."""
    channel: int
    """One feed-forward channel, over all feed-forward projections."""
    dense: BlockShape
    attention_rest: int = 0
    """What leaves with the last KV group besides it: norm and biases of an attention that can leave as a whole."""
    feed_forward_rest: int = 0
    """What leaves with the last channel besides it."""

    def parameters(self, shape: BlockShape) -> int:
        """Parameters of a block cut to `shape`."""
        groups = self.dense.kv_heads - shape.kv_heads
        kept = self.block - groups * self.kv_group - (self.dense.channels - shape.channels) * self.channel
        if groups and not shape.kv_heads:
            kept -= self.attention_rest
        if self.dense.channels and not shape.channels:
            kept -= self.feed_forward_rest
        return kept


def block_costs(checkpoint: Checkpoint, index: int = 0) -> BlockCosts:
    """Count block `index`; where all blocks are alike, the first stands for all."""
    family, shape = checkpoint.family, checkpoint.shapes[index]
    sizes = {
        relative: Size(checkpoint.tensors[name].shape).numel()
        for relative, name in checkpoint.block_names(index).items()
    }

    def per_unit(inputs: tuple[str, ...], output: str, units: int) -> int:
        if not units:
            return 0
        of_inputs = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in inputs)
        return (of_inputs + sizes[f"{output}.weight"]) // units

    def rest(sub_layer: str, unit: int, units: int) -> int:
        modules = family.sub_layers.get(sub_layer, ())
        return sum(size for name, size in sizes.items() if name.startswith(modules)) - unit * units if modules else 0

    attention = family.attention
    kv_group = per_unit((attention.query, attention.key, attention.value), attention.output, shape.kv_heads)
    channel = per_unit(family.feed_forward.inputs, family.feed_forward.output, shape.channels)
    return BlockCosts(
        block=sum(sizes.values()),
        kv_group=kv_group if family.heads_can_leave else 0,
        channel=channel,
        dense=shape,
        attention_rest=rest("attention", kv_group, shape.kv_heads),
        feed_forward_rest=rest("mlp", channel, shape.channels),
    )


@dataclass(frozen=True)
class ModelSize:
    """What a model costs to hold and to run."""

    block_parameters: int
    """In all blocks together."""
    total_parameters: int
    bytes: int
    """On disk, in the stored dtype."""
    flops_per_token: int
    """Of one forward pass at `context` tokens: two per weight of a matrix product, and the attention scores.

    A classifier's head runs once a text, not once a token, and is not counted.
    """
    block_flops_per_token: int
    """The part of them that the blocks take."""
    context: int


def model_size(checkpoint: Checkpoint, shapes: Mapping[int, BlockShape], context: int) -> ModelSize:
    """The size of the checkpoint with the blocks that `shapes` names, cut to what it says."""
    per_block = {index: block_costs(checkpoint, index).parameters(shape) for index, shape in shapes.items()}
    in_blocks = sum(per_block.values())
    outer = [checkpoint.tensors[name] for name in checkpoint.outer_names()]
    outer_parameters = sum(Size(tensor.shape).numel() for tensor in outer)
    predicts_tokens = checkpoint.task in (Task.causal_lm, Task.masked_lm)
    head = int(checkpoint.config.vocab_size) * checkpoint.d_model if predicts_tokens else 0
    scores = sum(2 * shape.heads * shape.head_dim * context for shape in shapes.values())
    block_flops = 2 * (in_blocks + scores)
    return ModelSize(
        block_parameters=in_blocks,
        total_parameters=in_blocks + outer_parameters,
        bytes=in_blocks * checkpoint.storage_dtype.itemsize + sum(tensor.bytes for tensor in outer),
        flops_per_token=block_flops + 2 * head,
        block_flops_per_token=block_flops,
        context=context,
    )


def size_of(checkpoint: Checkpoint, context: int) -> ModelSize:
    """The size of the checkpoint as it is."""
    return model_size(checkpoint, dict(enumerate(checkpoint.shapes)), context)
