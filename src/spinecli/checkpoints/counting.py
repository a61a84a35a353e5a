"""Parameters, multiply-adds and bytes, counted from shapes."""

from __future__ import annotations

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

    def parameters(self, shape: BlockShape) -> int:
        """Parameters of a block cut to `shape`."""
        groups = self.dense.kv_heads - shape.kv_heads
        return self.block - groups * self.kv_group - (self.dense.channels - shape.channels) * self.channel


def block_costs(checkpoint: Checkpoint) -> BlockCosts:
    """Count one block of a checkpoint whose blocks are all alike."""
    family, shape = checkpoint.family, checkpoint.shape
    sizes = {relative: Size(checkpoint.tensors[name].shape) for relative, name in checkpoint.block_names(0).items()}

    def per_unit(projections: tuple[str, ...], output: str, units: int) -> int:
        inputs = sum(size.numel() for name, size in sizes.items() if name.rpartition(".")[0] in projections)
        return (inputs + sizes[f"{output}.weight"].numel()) // units

    attention = family.attention
    return BlockCosts(
        block=sum(size.numel() for size in sizes.values()),
        kv_group=per_unit((attention.query, attention.key, attention.value), attention.output, shape.kv_heads)
        if family.heads_can_leave
        else 0,
        channel=per_unit(family.feed_forward.inputs, family.feed_forward.output, shape.channels),
        dense=shape,
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


def model_size(checkpoint: Checkpoint, blocks: int, shape: BlockShape, context: int) -> ModelSize:
    """The size of the checkpoint if it had `blocks` blocks of `shape`."""
    costs = block_costs(checkpoint)
    per_block = costs.parameters(shape)
    outer = [checkpoint.tensors[name] for name in checkpoint.outer_names()]
    outer_parameters = sum(Size(tensor.shape).numel() for tensor in outer)
    predicts_tokens = checkpoint.task in (Task.causal_lm, Task.masked_lm)
    head = int(checkpoint.config.vocab_size) * checkpoint.d_model if predicts_tokens else 0
    scores = 2 * shape.heads * shape.head_dim * context
    in_blocks = 2 * blocks * (per_block + scores)
    return ModelSize(
        block_parameters=blocks * per_block,
        total_parameters=blocks * per_block + outer_parameters,
        bytes=blocks * per_block * checkpoint.storage_dtype.itemsize + sum(tensor.bytes for tensor in outer),
        flops_per_token=in_blocks + 2 * head,
        block_flops_per_token=in_blocks,
        context=context,
    )
