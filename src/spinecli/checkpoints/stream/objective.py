"""By what a cut or a recovery is judged as a whole, on rows that nothing was fitted to.

A causal language model is judged by how far its next-token distributions are from the dense model's. An encoder
predicts no next token and a classifier's labels are not at hand, so they are judged by how far their last hidden states
have moved from those of the dense model.
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
    """A number that is better the lower it is, and 0 for the dense model itself."""

    key: str
    """In short: "divergence" or "distance"."""
    name: str
    """For a person."""
    measure: Callable[[BlockStream, Mapping[str, Tensor], Tensor], dict[str, Tensor]]
    """Called with a stream, models' hidden states behind their last blocks by name, and the dense model's, all (rows,
    length, d_model). Gives (rows,) float64 by name."""


def objective_of(checkpoint: Checkpoint) -> Objective:
    """The divergence of a causal language model; of all others the distance to the dense model's output."""
    return DIVERGENCE if checkpoint.task is Task.causal_lm else OUTPUT_DISTANCE


# Logits of one model that are in memory together.
_LOGIT_BYTES = 64 << 20


@torch.no_grad()
def _divergence(stream: BlockStream, models: Mapping[str, Tensor], dense: Tensor) -> dict[str, Tensor]:
    """KL(dense || model) of the next token in nats, the mean over each row's predicted positions."""
    first = stream.predicted_from - 1
    wanted = dense[:, first:].flatten(0, 1)
    found = {name: hidden[:, first:].flatten(0, 1) for name, hidden in models.items()}
    tokens = {name: torch.empty(len(wanted), dtype=torch.float64) for name in models}
    together = max(16, _LOGIT_BYTES // (4 * int(stream.checkpoint.config.vocab_size)))
    with stream.token_logits() as logits:
        for start in range(0, len(wanted), together):
            part = slice(start, start + together)
            reference = logits(wanted[part]).log_softmax(dim=-1)
            probabilities = reference.exp()
            for name, hidden in found.items():
                ratio = reference - logits(hidden[part]).log_softmax(dim=-1)
                tokens[name][part] = (probabilities * ratio).sum(dim=-1).double().cpu()
    return {name: each.view(len(dense), -1).mean(dim=1) for name, each in tokens.items()}


def _output_distance(stream: BlockStream, models: Mapping[str, Tensor], dense: Tensor) -> dict[str, Tensor]:
    """||H - D||² / ||D||² of every row, H and D the hidden states that the head sees."""
    wanted = torch.cat(list(stream.features(dense))).double().flatten(1)
    size = wanted.square().sum(dim=1).clamp_min(1e-300)
    return {
        name: ((torch.cat(list(stream.features(hidden))).double().flatten(1) - wanted).square().sum(dim=1) / size).cpu()
        for name, hidden in models.items()
    }


DIVERGENCE = Objective("divergence", "KL divergence from the dense model's next token, in nats", _divergence)
OUTPUT_DISTANCE = Objective("distance", "distance to the dense model's output", _output_distance)
