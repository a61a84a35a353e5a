"""How far streams have moved from the dense model's, without labels: in what the model would answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spinecli.calibration.objective import OUTPUT_DISTANCE
from spinecli.calibration.stream import BlockStream
from spinecli.checkpoints.family import Task


def divergence(stream: BlockStream, dense: Tensor, streams: Mapping[str, Tensor]) -> dict[str, float]:
    """For every stream behind the last block, (rows, length, d_model), how far it is from the dense one.

    Language models: the mean Kullback-Leibler divergence of the next token, KL(dense || stream), in nats. Others: the
    relative squared distance of their last hidden states.
    """
    if stream.checkpoint.task is not Task.causal_lm:
        none = torch.zeros(0)
        return {name: OUTPUT_DISTANCE.measure(stream, hidden, dense, none) for name, hidden in streams.items()}
    return {name: _kullback_leibler(stream, dense, hidden) for name, hidden in streams.items()}


def _kullback_leibler(stream: BlockStream, dense: Tensor, hidden: Tensor) -> float:
    total, tokens = 0.0, 0
    first = stream.predicted_from - 1
    for wanted, found in zip(stream.logits(dense), stream.logits(hidden), strict=True):
        reference = wanted[:, first:].log_softmax(dim=-1)
        each = (reference.exp() * (reference - found[:, first:].log_softmax(dim=-1))).sum(dim=-1)
        total += float(each.sum(dtype=torch.float64))
        tokens += each.numel()
    return total / tokens
