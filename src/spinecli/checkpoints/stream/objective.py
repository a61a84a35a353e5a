"""By what a cut or a recovery is scored as a whole, on rows that nothing was fitted to.

By what a cut or a recovery is judged as a whole, on rows that nothing was fitted to.

A causal language model has its loss. An encoder predicts no next token and a classifier's labels are not at hand, so
they are judged without labels, by how far their last hidden states have moved from those of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.stream.block_stream import BlockStream


@dataclass(frozen=True)
class Objective:
    """A number that is better the lower it is."""

    key: str
    """In reports: "loss" or "distance"."""
    name: str
    """For a person."""
    measure: Callable[[BlockStream, Tensor, Tensor, Tensor], float]
    """Called with a stream, a model's hidden states behind its last block, the dense model's, both (rows, length,
    d_model), and the tokens (rows, length)."""


def objective_of(checkpoint: Checkpoint) -> Objective:
    """The next-token loss of a causal language model; of all others the distance to the dense model's output."""
    return NEXT_TOKEN_LOSS if checkpoint.task is Task.causal_lm else OUTPUT_DISTANCE


def _next_token_loss(stream: BlockStream, hidden: Tensor, dense: Tensor, tokens: Tensor) -> float:
    return float(stream.losses(hidden, tokens).mean())


def _output_distance(stream: BlockStream, hidden: Tensor, dense: Tensor, tokens: Tensor) -> float:
    """||H - D||² / ||D||² over all rows, H and D the hidden states that the head sees."""
    found, wanted = (torch.cat(list(stream.features(states))).double() for states in (hidden, dense))
    return float((found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-300))


NEXT_TOKEN_LOSS = Objective("loss", "next-token loss in nats", _next_token_loss)
OUTPUT_DISTANCE = Objective("distance", "distance to the dense model's output", _output_distance)


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
