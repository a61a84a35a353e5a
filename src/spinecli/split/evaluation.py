"""The joined model on held-out data."""

from __future__ import annotations

import torch

from spinecli.federation.data.batches import evaluation_batches
from spinecli.federation.data.encoding import Encoded
from spinecli.federation.device.objective import tally_of
from spinecli.federation.evaluation import EVALUATION_BATCH, measurement_of, probe_batch
from spinecli.federation.history import Measurement
from spinecli.split.model import Parameters, SplitModel


@torch.no_grad()
def evaluate(model: SplitModel, trained: Parameters, data: Encoded) -> Measurement:
    """Loss and accuracy over all answers.

    Args:
        trained: the trained tensors of both halves.
    """
    batches = evaluation_batches(data, EVALUATION_BATCH)
    return measurement_of([tally_of(*model.joined_answers(trained, batch)) for batch in batches])


@torch.no_grad()
def probe(model: SplitModel, trained: Parameters, data: Encoded) -> Measurement:
    """The same on the first few rows."""
    return measurement_of([tally_of(*model.joined_answers(trained, probe_batch(data)))])
