"""From a request to everything the rounds need: the cut model, the engine with its devices, the server's half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.errors import FederationError
from spinecli.federation.client.device import DeviceMemory
from spinecli.federation.engine import Engine, Node
from spinecli.federation.memory import places_of
from spinecli.federation.request import FederatedRequest
from spinecli.federation.simulation.local_engine import LocalEngine, Simulated
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.federation.split.control.population import Population
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.device import SplitDevice, handle
from spinecli.federation.split.messages import Expected
from spinecli.federation.split.model import SplitModel
from spinecli.federation.split.request import SplitRequest, rows_held
from spinecli.federation.split.server import MergedTop, Top, TopsApart


@dataclass(frozen=True, eq=False)
class SplitFederation:
    """A run that is ready to begin."""

    model: SplitModel
    engine: Engine
    population: Population
    top: Top
    bottom: dict[str, Tensor]
    costs: SplitCosts
    expected: Expected


def set_up(request: SplitRequest, engine: Engine | None = None) -> SplitFederation:
    """Load the model once.

    Args:
        engine: where the devices are; None lends the model to every device of a fleet simulated in this process.

    Raises: FederationError if a device counts other labels than the run has, or if the devices' memory does not hold
    what the strategy asks of them.
    """
    federated, config, checkpoint = request.federated, request.config, request.federated.checkpoint
    task = federated.splits.train.task
    model = SplitModel(
        checkpoint,
        task,
        federated.labels or 0,
        request.cut,
        config.split,
        config.lora,
        federated.train.pad_id,
        config.seed,
        federated.compute,
    )
    costs = request.costs()
    engine = engine or _simulated(federated, model, costs)
    nodes = engine.nodes()
    _require_counts(nodes, federated.labels or 0)
    known = places_of((node.device_class, node.memory_bytes, node.examples) for node in nodes)
    if refused := request.memory_objection(request.needs(known)):
        raise FederationError(refused)
    kind = MergedTop if request.strategy.merged else TopsApart
    return SplitFederation(
        model=model,
        engine=engine,
        population=population_of(nodes, costs, federated.longest),
        top=kind(model, model.top_start, config.split.optimizer, config.train.clip_norm),
        bottom=dict(model.bottom_start),
        costs=costs,
        expected=Expected(
            task=task,
            d_model=checkpoint.d_model,
            choices=federated.labels or int(checkpoint.config.vocab_size),
            longest=federated.longest,
            feature_dtype=config.split.feature_dtype,
        ),
    )


def _simulated(federated: FederatedRequest, model: SplitModel, costs: SplitCosts) -> LocalEngine[SplitDevice]:
    devices: dict[str, Simulated[SplitDevice]] = {}
    for spec, part in zip(federated.fleet.devices, federated.parts, strict=True):
        meter = VirtualMeter()
        device = SplitDevice(spec.name, model, costs, federated.train, part, DeviceMemory(), meter)
        devices[spec.name] = Simulated(device, meter)
    return LocalEngine(federated.fleet, devices, handle, federated.config.seed)


def _require_counts(nodes: Sequence[Node], labels: int) -> None:
    """Cohorts and batches are planned by what devices say of their labels, so that has to make sense."""
    for node in nodes:
        counts = node.label_counts
        if len(counts) != labels or (labels and sum(counts) != node.examples):
            raise FederationError(
                f"{node.name} has {node.examples} examples and counts {sum(counts)} of {len(counts)} labels, where "
                f"this run has {labels} labels; start it with data of this run, or go on without it."
            )


def population_of(nodes: Sequence[Node], costs: SplitCosts, longest: int) -> Population:
    """The devices as the control module sees them; without labels, one label that all examples have."""
    held = [rows_held(costs, longest, node.memory_bytes) for node in nodes]
    counts = [node.label_counts or (node.examples,) for node in nodes]
    return Population(
        names=[node.name for node in nodes],
        classes=[node.device_class for node in nodes],
        label_counts=torch.tensor(counts),
        memory_rows=torch.tensor(held),
    )
