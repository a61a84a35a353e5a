"""By what a cut or a recovery is judged as a whole, on rows that nothing was fitted to.

A causal language model has its loss. An encoder predicts no next token and a classifier's labels are not at hand, so
they are judged without labels, by how far their last hidden states have moved from those of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.calibration.stream import BlockStream
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task


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
