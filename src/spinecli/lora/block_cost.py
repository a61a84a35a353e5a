"""What one block costs per token under LoRA: operations, and the values that autograd keeps.

The block is walked in the order in which it computes. On the way the walk knows whether the value at hand carries a
gradient: from the first adapted projection on it does, and before that nothing is computed or kept for backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Family
from spinecli.checkpoints.shape import BlockShape


@dataclass(frozen=True)
class BlockCost:
    """One block, per token."""

    forward_flops: int
    backward_flops: int
    saved_values: int
    """Values that autograd keeps between forward and backward."""
    reached: bool
    """Whether the block's output carries a gradient."""


@dataclass(frozen=True)
class BlockLayout:
    """Everything about a checkpoint's blocks that their costs depend on, except widths and ranks."""

    family: Family
    d_model: int
    targets: frozenset[str]
    """Adapted projections, relative to a block."""
    biased: frozenset[str]
    """Projections with a bias."""
    fixed_parameters: int
    """Of one block with both sub-layers, outside its projections: norms."""
    post_norm: bool
    parallel: bool
    """Both sub-layers read the block's input."""
    norms_heads: bool
    """Query and key are normed head by head."""
    keeps_activation: bool
    """The activation's backward needs its input, so that its output is kept besides where LoRA reads it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, targets: frozenset[str]) -> BlockLayout:
        """Read the layout off a checkpoint; no weight is read."""
        family, config = checkpoint.family, checkpoint.config
        # of all blocks, since the first may have lost a sub-layer
        sizes = {
            relative: checkpoint.tensors[name].shape
            for index in range(checkpoint.blocks)
            for relative, name in checkpoint.block_names(index).items()
        }
        coupled = {name for stage in _stages(family) for name in stage}
        activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        norms = [Size(size).numel() for name, size in sizes.items() if name.rpartition(".")[0] not in coupled]
        return cls(
            family=family,
            d_model=checkpoint.d_model,
            targets=targets,
            biased=frozenset(name for name in coupled if f"{name}.bias" in sizes),
            fixed_parameters=sum(norms),
            post_norm=checkpoint.is_post_norm,
            parallel=bool(getattr(config, family.config_keys.parallel or "", False)),
            norms_heads=any(name.endswith("q_norm.weight") for name in sizes),
            keeps_activation=len(family.feed_forward.inputs) > 1 or activation != "relu",
        )

    def projections(self, shape: BlockShape) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every projection that a block cut to `shape` has, by relative name."""
        attention, feed_forward = self.family.attention, self.family.feed_forward
        query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        rows = dict.fromkeys(self.family.projections, 0)
        rows[attention.query] += query
        for name in (attention.key, attention.value):
            rows[name] += key_value
        for name in feed_forward.inputs:
            rows[name] += shape.channels
        outputs = {attention.output: query, feed_forward.output: shape.channels}
        return {
            name: (self.d_model, outputs[name]) if name in outputs else (d_out, self.d_model)
            for name, d_out in rows.items()
            if d_out or outputs.get(name)
        }

    def parameters(self, shape: BlockShape) -> int:
        """Frozen parameters of a block cut to `shape`."""
        return self.fixed_parameters + sum(
            d_out * d_in + d_out * (name in self.biased) for name, (d_out, d_in) in self.projections(shape).items()
        )

    def adapter_parameters(self, shape: BlockShape, rank: int) -> int:
        """Numbers in the LoRA factors of a block cut to `shape`."""
        return rank * sum(sum(size) for name, size in self.projections(shape).items() if name in self.targets)

    def cost(self, shape: BlockShape, rank: int, length: int, reached: bool) -> BlockCost:
        """One block per token, in rows of `length` tokens.

        Args:
            rank: of the LoRA factors of each target; 0 for none.
            reached: whether the block's input carries a gradient.
        """
        sizes = self.projections(shape)
        forward = backward = saved = 0
        entered, attended = reached, False
        for stage in _stages(self.family):
            if stage[0] not in sizes:
                continue
            if self.parallel and self.family.feed_forward.inputs[0] in stage:
                reached, attended = entered, reached
            adapted = [name for name in stage if rank and name in self.targets]
            for name in stage:
                d_out, d_in = sizes[name]
                forward += 2 * d_out * d_in
                backward += 2 * d_out * d_in * reached
            for name in adapted:
                d_out, d_in = sizes[name]
                forward += 2 * rank * (d_in + d_out)
                # gradients of A, of B, of B's input, and of A's input if anything below waits for it
                backward += 2 * rank * (d_in + 2 * d_out + d_in * reached)
            saved += rank * len(adapted) + self._saved_before(stage, shape, bool(adapted), reached)
            reached = reached or bool(adapted)
            if self.family.attention.query in stage:
                scores = 4 * shape.heads * shape.head_dim * length
                forward += scores
                backward += 2 * scores * reached
            saved += self._saved_after(stage, shape) * reached
        return BlockCost(forward, backward, saved, reached or attended)

    def _saved_before(self, stage: tuple[str, ...], shape: BlockShape, adapted: bool, reached: bool) -> int:
        """Values kept of a stage's input: by the norm in front of it, and by the stage's factors A."""
        if self.family.attention.output in stage:
            # where the gradient has reached, the attention itself keeps its result, unless that is copied on the way
            # here: families with fused projections rotate parts of heads, which leaves the heads before the tokens
            copied = self.family.attention.fused is not None
            return shape.heads * shape.head_dim * (adapted and (copied or not reached))
        if self.family.feed_forward.output in stage:
            return shape.channels * (adapted and (self.keeps_activation or not reached))
        normed = not self.post_norm and self.family.input_norms
        shared = self.parallel and self.family.feed_forward.inputs[0] in stage  # with the norm before attention
        return self.d_model * (adapted + (reached and normed and not shared))

    def _saved_after(self, stage: tuple[str, ...], shape: BlockShape) -> int:
        """Values kept of what follows a stage that the gradient has reached: attention, activation, or a norm."""
        if self.family.attention.query in stage:
            # query, key, value and result; key and value are repeated to one per query head when rows are padded
            query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
            return 4 * query + (query + key) * self.norms_heads
        if self.family.feed_forward.inputs[0] in stage:
            # a gated layer keeps both inputs and the activated gate
            return shape.channels * (3 if len(self.family.feed_forward.inputs) > 1 else 1)
        return self.d_model * (self.post_norm or self.family.output_norms)


def _stages(family: Family) -> tuple[tuple[str, ...], ...]:
    """The projections of a block in the order in which it computes them; those of one stage stand side by side."""
    attention, feed_forward = family.attention, family.feed_forward
    return (
        tuple(dict.fromkeys((attention.query, attention.key, attention.value))),
        (attention.output,),
        tuple(dict.fromkeys(feed_forward.inputs)),
        (feed_forward.output,),
    )
