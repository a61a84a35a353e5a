"""What a round asks of a device at each depth, counted from shapes: FLOPs, message bytes, memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.skeleton import build_skeleton
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.planning.ranks import ranks_by_device

_FACTOR_BYTES = 4
"""Factors and head travel in float32."""


@dataclass(frozen=True)
class LocalWork:
    """What every device does in a round."""

    batch_size: int
    length: int
    """Tokens a row."""
    steps: int
    weight_bytes: int
    """Bytes per frozen weight in the device's memory."""


@dataclass(frozen=True, eq=False)
class DepthCosts:
    """Costs by depth, entry k - 1 for depth k; all (blocks,) float64."""

    forward_flops: Tensor
    """Of a whole round."""
    backward_flops: Tensor
    message_bytes: Tensor
    """Of one message, the same up and down."""
    memory_bytes: Tensor


@dataclass(frozen=True)
class Head:
    """What stands behind the last block."""

    weights: int
    """In its matrices."""
    parameters: int
    """With biases."""
    per_token: bool
    trained: bool


@dataclass(frozen=True)
class Workload:
    """A checkpoint, what is adapted in it, and the local work."""

    checkpoint: Checkpoint
    targets: tuple[str, ...]
    head: Head
    work: LocalWork

    def by_depth(self, ranks: Tensor) -> DepthCosts:
        """Costs of every depth under a rank distribution (blocks,)."""
        checkpoint, head, work = self.checkpoint, self.head, self.work
        costs = TrainingCosts.of(checkpoint, self.targets, head.weights, head.per_token, head_trained=head.trained)
        shapes = checkpoint.shapes
        rows = []
        for placed in ranks_by_device(ranks, torch.arange(1, len(ranks) + 1)).tolist():
            step = costs.step(shapes, placed, work.batch_size, work.length)
            memory = costs.memory(shapes, placed, work.batch_size, work.length, work.weight_bytes)
            message = (
                costs.adapter_bytes(shapes, placed, _FACTOR_BYTES) + head.trained * head.parameters * _FACTOR_BYTES
            )
            rows.append((work.steps * step.forward_flops, work.steps * step.backward_flops, message, memory.total))
        return DepthCosts(*torch.tensor(rows, dtype=torch.float64).unbind(dim=1))

    def narrowest(self) -> int:
        """The smaller side of the narrowest adapted projection: the highest rank that can be of use."""
        weights = tuple(f".{target}.weight" for target in self.targets)
        return min(min(tensor.shape) for name, tensor in self.checkpoint.tensors.items() if name.endswith(weights))


def head_of(checkpoint: Checkpoint, labels: int | None) -> Head:
    """The frozen language-model head, or with `labels` the classifier that transformers puts on this family."""
    if labels is None:
        weights = int(checkpoint.config.vocab_size) * checkpoint.d_model
        return Head(weights, weights, per_token=True, trained=False)
    config = copy.deepcopy(checkpoint.config)
    config.num_labels = labels
    family = checkpoint.family
    family.require_classifier()
    children = build_skeleton(config, Task.classification).named_children()
    modules = [module for name, module in children if name.endswith(family.classification_head)]
    sizes = [parameter.shape for module in modules for parameter in module.parameters()]
    weights = sum(size.numel() for size in sizes if len(size) == 2)
    parameters = sum(size.numel() for size in sizes)
    return Head(weights, parameters, per_token=family.kind == "causal", trained=True)
