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
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.shape import BlockShape
from spinecli.lora.block_cost import BlockCost, BlockLayout

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
