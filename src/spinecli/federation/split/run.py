"""`spine fed-launch` with a split strategy as a library call: run the rounds, join the halves, publish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.checkpoint import fine_tuned
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.masks import Masks
from spinecli.data.batches import evaluation_batches
from spinecli.data.encoding import Encoded
from spinecli.errors import FederationError
from spinecli.evaluation.plots import can_plot
from spinecli.federation.client.device import DeviceMemory
from spinecli.federation.client.training import tally_of
from spinecli.federation.deploy import label_settings, verify_answers
from spinecli.federation.engine import Connect, Engine, Node
from spinecli.federation.evaluation import EVALUATION_BATCH, measurement_of, probe_batch
from spinecli.federation.history import History, Measurement, RoundRecord, RunState
from spinecli.federation.memory import places_of
from spinecli.federation.request import FederatedRequest
from spinecli.federation.results import FederatedResult, summarised
from spinecli.federation.rounds import Listener
from spinecli.federation.rounds_picture import PICTURE_NAME, save_picture
from spinecli.federation.run import history_so_far, require_learned, summary_of, unheard
from spinecli.federation.simulation.local_engine import LocalEngine, Simulated
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.federation.split.control.estimates import Population
from spinecli.federation.split.control.plan import ControlState
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.device import SplitDevice, handle
from spinecli.federation.split.messages import Expected
from spinecli.federation.split.model import Parameters, SplitModel
from spinecli.federation.split.request import SplitRequest, rows_held
from spinecli.federation.split.rounds import SplitLoop
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


def launch(
    request: SplitRequest,
    output: OutputOptions,
    stopwatch: Stopwatch | None = None,
    listener: Listener = unheard,
    connect: Connect | None = None,
) -> Manifest:
    """Train over the fleet into a new directory, which holds the joined checkpoint.

    Args:
        connect: opens the engine that reaches the devices; None simulates the fleet in this process.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, OptionError if the fleet's memory does not hold what
    the strategy asks for, FederationError, VerificationError, and what reading can raise.
    """
    stopwatch = stopwatch or Stopwatch()
    federated = request.federated
    run = Run(
        kind="joined-checkpoint",
        command="fed-launch",
        config=request.config,
        parameters=request.parameters(),
        seed=request.config.seed,
        inputs=federated.inputs,
        lineage=federated.lineage,
    )
    if finished := run.finished(output):
        return finished
    check_output(output, [federated.checkpoint.path])
    request.require_memory()
    with run.working(output) as work, ExitStack() as devices:
        with stopwatch("loading"):
            engine = devices.enter_context(connect(work.state)) if connect else None
            federation = set_up(request, engine)
        loop, history = _run_rounds(request, federation, work, stopwatch, listener)
        require_learned(history, request.config.train.deadline, work)
        with stopwatch("writing"):
            result = _write(request, federation, loop, history.rounds, work.files)
        summary = summary_of(federated, result)
        return run.publish(work, summary, result.model_dump(mode="json"), stopwatch.measured())


def loop_of(
    request: SplitRequest, federation: SplitFederation, stopwatch: Stopwatch, work: WorkDirectory | None
) -> SplitLoop:
    """The loop of a federation that has not begun.

    Args:
        work: where the state is saved after every round; None saves nothing.
    """
    model = federation.model

    def measure(trained: Parameters) -> Measurement:
        with stopwatch("evaluating"):
            return evaluate(model, trained, request.federated.evaluation)

    def look(trained: Parameters) -> Measurement:
        with stopwatch("evaluating"):
            return probe(model, trained, request.federated.evaluation)

    def save(reached: RunState) -> None:
        if work is not None:
            with stopwatch("saving"):
                reached.save(work.state)

    return SplitLoop(
        config=request.config,
        split=request.strategy.split,
        engine=federation.engine,
        population=federation.population,
        control=request.control(),
        top=federation.top,
        bottom=federation.bottom,
        costs=federation.costs,
        expected=federation.expected,
        evaluate=measure,
        save=save,
        state=ControlState(),
        row_bytes=request.row_bytes,
        probe=look,
    )


def _run_rounds(
    request: SplitRequest,
    federation: SplitFederation,
    work: WorkDirectory,
    stopwatch: Stopwatch,
    listener: Listener,
) -> tuple[SplitLoop, History]:
    """All rounds that a killed run has not finished yet."""
    loop = loop_of(request, federation, stopwatch, work)

    def restore(state: RunState) -> None:
        loop.restore(state.strategy)
        federation.engine.restore(state.engine)

    history = history_so_far(work, restore)
    with stopwatch("training"):
        loop.run(history, listener)
    return loop, history


def _write(
    request: SplitRequest,
    federation: SplitFederation,
    loop: SplitLoop,
    rounds: Sequence[RoundRecord],
    directory: Path,
) -> FederatedResult:
    """The joined checkpoint, beside its history."""
    federated, trained = request.federated, loop.trained
    write_joined(directory, federation.model, trained, federated.splits.train.labels)
    verify_joined(directory, federation.model, trained, federated.evaluation)
    if can_plot() and rounds:
        title = f"{request.config.strategy} on {federated.fleet.name}, cut before block {request.cut}"
        save_picture(rounds, title, directory / PICTURE_NAME)
    return summarised(rounds, request.config.train.target_accuracy)
