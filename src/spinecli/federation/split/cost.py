"""What the two halves of a split model cost, counted from shapes: FLOPs and memory.

The rules are those of `lora.cost`. Where all weights are trained, backward takes twice what forward takes: once for the
gradients of the weights, once for those of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Size

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.shape import BlockShape
from spinecli.federation.config import LoraConfig, SplitConfig
from spinecli.federation.planning.workload import Head
from spinecli.lora.cost import BlockLayout, StepCost
from spinecli.lora.factors import target_projections

_VALUE_BYTES = 4
_STATE_VALUES = {"adamw": 4, "sgd": 2}
"""Per trained number: itself, its gradient, and what the optimiser keeps of it."""


@dataclass(frozen=True)
class SplitCosts:
    """Costs of one checkpoint cut before block `cut`."""

    layout: BlockLayout
    checkpoint: Checkpoint
    cut: int
    split: SplitConfig
    rank: int
    """Of LoRA, in a half that trains it."""
    head: Head

    @classmethod
    def of(cls, checkpoint: Checkpoint, cut: int, split: SplitConfig, lora: LoraConfig, head: Head) -> SplitCosts:
        """Read off a checkpoint what the costs depend on; no weight is read."""
        targets = frozenset(target_projections(checkpoint.family, lora.targets))
        return cls(BlockLayout.of(checkpoint, targets), checkpoint, cut, split, lora.rank, head)

    def bottom(self, rows: int, length: int) -> StepCost:
        """Forward and backward of one batch on a device, padded tokens included."""
        shapes = self.checkpoint.shapes[: self.cut]
        return self._blocks(shapes, self.split.bottom, rows * length, length, reached=False)

    def top(self, rows: int, length: int) -> StepCost:
        """Forward and backward of one batch on the server, down to the gradients of the features."""
        shapes = self.checkpoint.shapes[self.cut :]
        inner = self._blocks(shapes, self.split.top, rows * length, length, reached=True)
        head = 2 * self.head.weights * (rows * length if self.head.per_token else rows)
        return StepCost(
            inner.forward_flops + head, inner.backward_flops + head * (1 + (self.head.trained or self._trains_head))
        )

    def whole(self, rows: int, length: int) -> StepCost:
        """Both halves on one machine."""
        bottom, top = self.bottom(rows, length), self.top(rows, length)
        return StepCost(bottom.forward_flops + top.forward_flops, bottom.backward_flops + top.backward_flops)

    def device_memory(self, rows: int, length: int) -> int:
        """Bytes on a device: of the bottom, and where the model is not split also of its head and the logits."""
        held = self.bottom_memory(rows, length)
        if self.cut < self.checkpoint.blocks:
            return held
        tokens, d_model = rows * length, self.layout.d_model
        states = _STATE_VALUES[self.split.optimizer] if self.head.trained or self._trains_head else 1
        logits = (tokens if self.head.per_token else rows) * (self.head.weights // d_model)
        # what the final norm and the head keep of their inputs
        saved = tokens * d_model * ((not self.layout.post_norm) + (states > 1)) + logits
        return held + _VALUE_BYTES * (states * self.head.parameters + saved)

    def rows_held(self, length: int, memory_bytes: int) -> int:
        """Rows of a batch that a device's memory holds beside its part of the model; below 0 if not even that fits."""
        fixed = self.device_memory(0, length)
        return (memory_bytes - fixed) // max(1, self.device_memory(1, length) - fixed)

    def bottom_memory(self, rows: int, length: int) -> int:
        """Bytes on a device at the end of a forward pass: its weights, what autograd keeps, what is trained."""
        layout, shapes = self.layout, self.checkpoint.shapes[: self.cut]
        frozen = self._embedding_parameters() + sum(layout.parameters(shape) for shape in shapes)
        saved = 0
        if self.split.bottom == "full":
            trained = frozen
            # a weight's gradient needs its input, as that of LoRA's A does
            every = replace(layout, targets=frozenset(layout.family.projections))
            saved = sum(every.cost(shape, 1, length, reached=True).saved_values for shape in shapes)
        else:
            trained = sum(layout.adapter_parameters(shape, self.rank) for shape in shapes)
            reached = False
            for shape in shapes:
                cost = layout.cost(shape, self.rank, length, reached)
                saved, reached = saved + cost.saved_values, cost.reached
        kept = _STATE_VALUES[self.split.optimizer] * trained
        return _VALUE_BYTES * (frozen * (self.split.bottom == "lora") + rows * length * saved + kept)

    def bottom_parameters(self) -> int:
        """Numbers that are trained, and travel, of the bottom."""
        shapes = self.checkpoint.shapes[: self.cut]
        if self.split.bottom == "full":
            return self._embedding_parameters() + sum(self.layout.parameters(shape) for shape in shapes)
        return sum(self.layout.adapter_parameters(shape, self.rank) for shape in shapes)

    @property
    def _trains_head(self) -> bool:
        return self.split.top == "full"

    def _blocks(self, shapes: Sequence[BlockShape], way: str, tokens: int, length: int, *, reached: bool) -> StepCost:
        if way == "full":
            forward = sum(self.layout.cost(shape, 0, length, reached=True).forward_flops for shape in shapes)
            return StepCost(tokens * forward, tokens * 2 * forward)
        forward = backward = 0
        for shape in shapes:
            cost = self.layout.cost(shape, self.rank, length, reached)
            forward, backward, reached = forward + cost.forward_flops, backward + cost.backward_flops, cost.reached
        return StepCost(tokens * forward, tokens * backward)

    def _embedding_parameters(self) -> int:
        """Everything outside the blocks but the head; a final norm is counted, too, which is small."""
        checkpoint = self.checkpoint
        base = checkpoint.blocks_path.partition(".")[0] + "." if checkpoint.task is not Task.encoding else ""
        names = [name for name in checkpoint.outer_names() if name.startswith(base)]
        return sum(Size(checkpoint.tensors[name].shape).numel() for name in names)
