"""The joined model on held-out data."""

from __future__ import annotations

import torch
from torch.nn import functional

from spinecli.federation.data.batches import evaluation_batches
from spinecli.federation.data.encoding import Encoded
from spinecli.federation.history import Measurement
from spinecli.split.model import Parameters, SplitModel

_BATCH = 64


@torch.no_grad()
def evaluate(model: SplitModel, trained: Parameters, data: Encoded) -> Measurement:
    """Loss and accuracy over all answers.

    Args:
        trained: the trained tensors of both halves.
    """
    loss, correct, answers = 0.0, 0, 0
    for batch in evaluation_batches(data, _BATCH):
        logits, targets = model.joined_answers(trained, batch)
        loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        correct += int((logits.argmax(dim=1) == targets).sum())
        answers += len(targets)
    return Measurement(loss=loss / max(answers, 1), accuracy=correct / max(answers, 1))
