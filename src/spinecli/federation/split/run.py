"""`spine fed-launch` with a split strategy as a library call: run the rounds, join the halves, publish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

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
from spinecli.evaluation.plots import can_plot
from spinecli.federation.client.objective import tally_of
from spinecli.federation.deploy import label_settings, verify_answers
from spinecli.federation.engine import Connect
from spinecli.federation.evaluation import EVALUATION_BATCH, measurement_of, probe_batch
from spinecli.federation.history import History, Measurement, RoundRecord
from spinecli.federation.results import FederatedResult, summarised
from spinecli.federation.rounds import Listener
from spinecli.federation.rounds_picture import PICTURE_NAME, save_picture
from spinecli.federation.run import history_so_far, require_learned, summary_of, unheard
from spinecli.federation.split.control.plan import ControlState
from spinecli.federation.split.model import Parameters, SplitModel
from spinecli.federation.split.request import SplitRequest
from spinecli.federation.split.rounds import SplitLoop
from spinecli.federation.split.setup import SplitFederation, set_up
from spinecli.federation.state import RunState


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
