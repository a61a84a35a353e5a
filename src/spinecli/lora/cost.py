"""What LoRA training costs, counted from shapes: FLOPs, memory and bytes.

Forward takes two operations per weight of every matrix product and token, and 4 * heads * head_dim * length per token
for the attention scores and their use (a causal mask halves nothing, as implementations compute the whole square).
Backward runs only from the lowest block with LoRA upward, and exactly where autograd needs it: frozen weights get no
gradient, and in the lowest block nothing is computed below the first adapted projection. Norms, activation functions,
softmax and the optimiser's own arithmetic are left out. docs/fleets.md states the rules in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Size

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Family, Task
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


_TRAINED_BYTES = 16
"""Per trained parameter, all float32: itself, its gradient, and Adam's two moments."""


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of one optimiser step on one batch."""

    forward_flops: int
    backward_flops: int

    @property
    def flops(self) -> int:
        """Both passes."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class MemoryCost:
    """Bytes that training holds at the end of the forward pass; gradients in flight and work space come on top."""

    weights: int
    """What is frozen: blocks as they are cut, embeddings, norms, and a frozen head."""
    activations: int
    """What autograd keeps for the backward pass."""
    optimiser: int
    """What is trained, LoRA and head, with gradients and Adam's moments."""

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.activations + self.optimiser


@dataclass(frozen=True)
class TrainingCosts:
    """Costs of training LoRA on one checkpoint, for any widths and ranks of its blocks.

    Everywhere, `shapes` has one shape per block, which may be cut and may differ; `ranks` one LoRA rank per block, 0
    where it has none; a batch has `rows` texts of `length` tokens.
    """

    layout: BlockLayout
    outer_parameters: int
    """Frozen parameters outside the blocks."""
    head_parameters: int
    head_per_token: bool
    head_trained: bool

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        targets: Sequence[str],
        head_parameters: int,
        head_per_token: bool,
        *,
        head_trained: bool = True,
    ) -> TrainingCosts:
        """Read off a checkpoint what the costs depend on; no weight is read.

        Args:
            targets: adapted projections, relative to a block, as `lora.targets.target_projections` gives them.
            head_parameters: weights of the matrices behind the last block; vocab_size * d_model for a language model.
            head_per_token: the head runs on every token and not once a row. The classifiers of transformers' causal
                families do, and take one token's answer afterwards.
            head_trained: False for a language model's own head, which stays frozen.
        """
        replaced = head_trained and checkpoint.task is not Task.encoding
        base = checkpoint.blocks_path.partition(".")[0] + "." if replaced else ""
        outer = [name for name in checkpoint.outer_names() if name.startswith(base)]
        return cls(
            layout=BlockLayout.of(checkpoint, frozenset(targets)),
            outer_parameters=sum(Size(checkpoint.tensors[name].shape).numel() for name in outer),
            head_parameters=head_parameters,
            head_per_token=head_per_token,
            head_trained=head_trained,
        )

    def step(self, shapes: Sequence[BlockShape], ranks: Sequence[int], rows: int, length: int) -> StepCost:
        """Forward and backward of one batch, padded tokens included."""
        tokens = rows * length
        blocks = self._blocks(shapes, ranks, length)
        head = 2 * self.head_parameters * (tokens if self.head_per_token else rows)
        return StepCost(
            forward_flops=tokens * sum(block.forward_flops for block in blocks) + head,
            backward_flops=tokens * sum(block.backward_flops for block in blocks)
            + head * (self.head_trained + _reached(blocks)),
        )

    def memory(
        self, shapes: Sequence[BlockShape], ranks: Sequence[int], rows: int, length: int, bytes_per_weight: int
    ) -> MemoryCost:
        """Bytes while training; activations have the precision of the weights."""
        blocks = self._blocks(shapes, ranks, length)
        parameters = self.outer_parameters + sum(self.layout.parameters(shape) for shape in shapes)
        saved = rows * length * sum(block.saved_values for block in blocks)
        saved += self._saved_behind(rows, length, _reached(blocks))
        trained = self.adapter_parameters(shapes, ranks) + self.head_parameters * self.head_trained
        return MemoryCost(parameters * bytes_per_weight, saved * bytes_per_weight, trained * _TRAINED_BYTES)

    def saved_values(
        self, shapes: Sequence[BlockShape], ranks: Sequence[int], rows: int, length: int
    ) -> tuple[int, ...]:
        """Values that autograd keeps of each block between forward and backward; 0 below the lowest LoRA block.

        Counted for fused attention (no square of scores is kept) without dropout. One number per token and norm or
        head, rotary tables and masks are left out.
        """
        return tuple(rows * length * block.saved_values for block in self._blocks(shapes, ranks, length))

    def adapter_parameters(self, shapes: Sequence[BlockShape], ranks: Sequence[int]) -> int:
        """Numbers in the LoRA factors of all blocks."""
        return sum(self.layout.adapter_parameters(shape, rank) for shape, rank in zip(shapes, ranks, strict=True))

    def adapter_bytes(self, shapes: Sequence[BlockShape], ranks: Sequence[int], bytes_per_value: int = 4) -> int:
        """Bytes of the LoRA factors in one message; head and the message's own header come on top."""
        return self.adapter_parameters(shapes, ranks) * bytes_per_value

    def _blocks(self, shapes: Sequence[BlockShape], ranks: Sequence[int], length: int) -> list[BlockCost]:
        costs: list[BlockCost] = []
        for shape, rank in zip(shapes, ranks, strict=True):
            costs.append(self.layout.cost(shape, rank, length, _reached(costs)))
        return costs

    def _saved_behind(self, rows: int, length: int, reached: bool) -> int:
        """Values kept behind the last block: by its final norm, by the head, and by the loss.

        A head that reads one token of a row keeps a view, and with it the whole row.
        """
        layout, tokens = self.layout, rows * length
        kept = tokens * layout.d_model * ((reached and not layout.post_norm) + self.head_trained)
        return kept + (tokens if self.head_per_token else rows) * (self.head_parameters // layout.d_model)


def _reached(blocks: Sequence[BlockCost]) -> bool:
    """Whether the gradient has reached the output of the last of `blocks`."""
    return bool(blocks) and blocks[-1].reached
