"""What local training minimises and held-out evaluation reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spinecli.data.batches import IGNORED, Batch
from spinecli.federation.client.base_model import BaseModel

_ENDS = 4
"""The loss before and after local training are means over the first and the last quarter of its steps."""


@dataclass(frozen=True)
class Tally:
    """Sums over answers: labels of rows, or next tokens."""

    loss: float
    """Negative log-likelihood in nats."""
    correct: int
    answers: int


def answers_of(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets, one row an answer: (answers, choices) float32 and (answers,) int64."""
    inputs = {name: value.to(base.device) for name, value in batch.model_inputs().items()}
    labels = batch.labels.to(base.device)
    if base.task == "classification":
        return base.model(**inputs).logits.float(), labels
    logits = base.model(**inputs, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return logits[counted].float(), targets[counted]


def loss_of(base: BaseModel, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of a batch, with its graph."""
    logits, targets = answers_of(base, batch)
    return functional.cross_entropy(logits, targets)


@torch.no_grad()
def tally(base: BaseModel, batch: Batch) -> Tally:
    """Loss and right answers of a batch."""
    return tally_of(*answers_of(base, batch))


def tally_of(logits: Tensor, targets: Tensor) -> Tally:
    """Loss and right answers of logits (answers, choices) and targets (answers,)."""
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    return Tally(float(loss), int((logits.argmax(dim=1) == targets).sum()), len(targets))


def loss_at_ends(losses: Sequence[float]) -> tuple[float, float]:
    """The loss before and after local training, from that of every step, at least one."""
    end = max(1, len(losses) // _ENDS)
    return sum(losses[:end]) / end, sum(losses[-end:]) / end
