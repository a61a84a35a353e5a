"""Everything that a split run is made of, from its request, and the joined checkpoint that it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spinecli.checkpoints.checkpoint import fine_tuned
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.masks import Masks
from spinecli.data.batches import evaluation_batches
from spinecli.data.encoding import Encoded
from spinecli.errors import FederationError
from spinecli.federation.client.device import DeviceMemory
from spinecli.federation.client.training import tally_of
from spinecli.federation.deploy import label_settings, verify_answers
from spinecli.federation.engine import Engine, Node
from spinecli.federation.evaluation import EVALUATION_BATCH, measurement_of, probe_batch
from spinecli.federation.history import Measurement
from spinecli.federation.results import ClassResult
from spinecli.federation.simulation.local_engine import simulated
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.federation.split.control.estimates import Population
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.device import SplitDevice, handle
from spinecli.federation.split.messages import Expected
from spinecli.federation.split.model import Parameters, SplitModel
from spinecli.federation.split.rounds import SplitTraining
from spinecli.federation.split.server import MergedTop, TopsApart

if TYPE_CHECKING:
    from spinecli.federation.split.request import SplitRequest


@dataclass(frozen=True, eq=False)
class SplitFederation:
    """A run that is ready to begin."""

    request: SplitRequest
    model: SplitModel
    training: SplitTraining

    def evaluate(self, model: Parameters) -> Measurement:
        """Both halves on what is held out."""
        return evaluate(self.model, model, self.request.evaluation)

    def probe(self, model: Parameters) -> Measurement:
        """The same on the first few rows."""
        return probe(self.model, model, self.request.evaluation)

    def write(self, directory: Path) -> tuple[ClassResult, ...]:
        """The joined checkpoint, which all devices would run.

        Raises: VerificationError.
        """
        trained, request = self.training.model, self.request
        write_joined(directory, self.model, trained, request.splits.train.labels)
        verify_joined(directory, self.model, trained, request.evaluation)
        return ()


def set_up(request: SplitRequest, engine: Engine | None = None) -> SplitFederation:
    """Load the model once.

    Args:
        engine: where the devices are; None lends the model to every device of a fleet simulated in this process.

    Raises: FederationError if a device counts other labels than the run has, or if the devices' memory does not hold
    what the strategy asks of them.
    """
    config, checkpoint = request.config, request.checkpoint
    task, labels = request.splits.train.task, request.labels or 0
    model = SplitModel(
        checkpoint,
        task,
        labels,
        request.cut,
        config.split,
        config.lora,
        request.train.pad_id,
        config.seed,
        request.compute,
    )
    costs = request.costs()
    data = request.train

    def device(name: str, part: Sequence[int], memory: DeviceMemory, meter: VirtualMeter) -> SplitDevice:
        return SplitDevice(name, model, costs, data, part, memory, meter)

    engine = engine or simulated(request.fleet, data, request.parts, device, handle, config.seed)
    nodes = engine.nodes()
    _require_counts(nodes, labels)
    request.require_memory_of(nodes)
    kind = MergedTop if request.strategy.merged else TopsApart
    training = SplitTraining(
        config=config,
        split=request.strategy.split,
        engine=engine,
        population=population_of(nodes, costs, request.longest),
        control=request.control(),
        top=kind(model, model.top_start, config.split.optimizer, config.train.clip_norm),
        bottom=dict(model.bottom_start),
        costs=costs,
        expected=Expected(
            task=task,
            d_model=checkpoint.d_model,
            choices=labels or int(checkpoint.config.vocab_size),
            longest=request.longest,
            feature_dtype=config.split.feature_dtype,
        ),
        row_bytes=request.row_bytes,
    )
    return SplitFederation(request, model, training)


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
    held = [costs.rows_held(longest, node.memory_bytes) for node in nodes]
    counts = [node.label_counts or (node.examples,) for node in nodes]
    return Population(
        names=[node.name for node in nodes],
        classes=[node.device_class for node in nodes],
        label_counts=torch.tensor(counts),
        memory_rows=torch.tensor(held),
    )


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


def write_joined(directory: Path, model: SplitModel, trained: Parameters, labels: Sequence[str]) -> None:
    """Write the checkpoint with what was trained in its place."""
    source = model.checkpoint
    classifies = model.task == "classification"
    settings = label_settings(labels, model.pad_id) if classifies else {}
    task = Task.classification if classifies else Task.causal_lm
    joined = fine_tuned(source, task, model.merged(trained), settings)
    write_cut(directory, joined, Masks.full(source.shapes))


def verify_joined(directory: Path, model: SplitModel, trained: Parameters, probe: Encoded) -> float:
    """Open the checkpoint as a stranger would; the largest difference of its logits from the split model's.

    Raises: VerificationError.
    """
    batch = probe_batch(probe)
    expected, _ = model.joined_answers(trained, batch)
    return verify_answers(directory, batch, expected.detach(), model.task, model.compute)
