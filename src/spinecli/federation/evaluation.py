"""The global model on held-out data, as each group of devices would run it."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.data.batches import Batch, collate, evaluation_batches
from spinecli.data.encoding import Encoded
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.training import Tally, tally
from spinecli.federation.history import Measurement
from spinecli.federation.strategies.strategy import DeployedModel, GlobalModel
from spinecli.lora.aggregation.contribution import restricted
from spinecli.lora.factors import Factors

EVALUATION_BATCH = 64
"""Rows that are evaluated together."""
PROBE_ROWS = 4
"""Held-out rows that show whether a model gives numbers at all."""


def evaluate(base: BaseModel, model: GlobalModel, data: Encoded) -> Measurement:
    """Loss and accuracy of the model of each group, averaged over the devices of the groups."""
    return _over_groups(base, model, list(evaluation_batches(data, EVALUATION_BATCH)))


def probe(base: BaseModel, model: GlobalModel, data: Encoded) -> Measurement:
    """The same on the first few rows."""
    return _over_groups(base, model, [probe_batch(data)])


def probe_batch(data: Encoded) -> Batch:
    """The first few rows."""
    return collate(data, list(range(min(PROBE_ROWS, len(data)))))


def _over_groups(base: BaseModel, model: GlobalModel, batches: Sequence[Batch]) -> Measurement:
    devices = sum(served.devices for served in model.served)
    groups = [(served.devices / devices, _measured(base, model, served, batches)) for served in model.served]
    return Measurement(
        loss=sum(share * found.loss for share, found in groups),
        accuracy=sum(share * found.accuracy for share, found in groups),
    )


def adapter_for(base: BaseModel, model: GlobalModel, served: DeployedModel) -> dict[str, Factors]:
    """The global adapter in the shape of a group's masks."""
    rows, columns = base.kept_units(served.masks) if served.masks else ({}, {})
    return {name: restricted(factors, rows.get(name), columns.get(name)) for name, factors in model.adapter.items()}


def _measured(base: BaseModel, model: GlobalModel, served: DeployedModel, batches: Sequence[Batch]) -> Measurement:
    with base.lent(model.head, served.masks):
        base.attach(adapter_for(base, model, served), trainable=False)
        return measurement_of([tally(base, batch) for batch in batches])


def measurement_of(tallies: Sequence[Tally]) -> Measurement:
    """Loss and accuracy over all answers."""
    answers = max(sum(each.answers for each in tallies), 1)
    return Measurement(
        loss=sum(each.loss for each in tallies) / answers,
        accuracy=sum(each.correct for each in tallies) / answers,
    )
