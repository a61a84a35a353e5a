"""`spine fed-launch` with a split strategy as a library call: run the rounds, join the halves, publish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.evaluation.plots import can_plot
from spinecli.federation.engine import Connect
from spinecli.federation.history import History, Measurement, RoundRecord
from spinecli.federation.plots import PICTURE_NAME, save_picture
from spinecli.federation.results import FederatedResult, summarised
from spinecli.federation.rounds import Listener
from spinecli.federation.run import history_so_far, require_learned, summary_of, unheard
from spinecli.federation.state import RunState
from spinecli.split.control.state import ControlState
from spinecli.split.evaluation import evaluate, probe
from spinecli.split.joined import verify_joined, write_joined
from spinecli.split.model import Parameters
from spinecli.split.request import SplitRequest
from spinecli.split.rounds import SplitLoop, SplitTraining
from spinecli.split.setup import SplitFederation, set_up


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
        parameters=request.parameters(),
        seed=federated.options.seed,
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
        require_learned(history, federated.options.deadline, work)
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
    run, model = request.federated.options, federation.model

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

    training = SplitTraining(
        steps=run.tuning.local_steps,
        learning_rate=run.tuning.learning_rate,
        optimizer=request.options.optimizer,
        seed=run.seed,
        split=request.strategy.split,
    )
    return SplitLoop(
        options=request.federated.round_options(),
        training=training,
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
        title = f"{federated.options.strategy} on {federated.fleet.name}, cut before block {request.cut}"
        save_picture(rounds, title, directory / PICTURE_NAME)
    return summarised(rounds, federated.options.target_accuracy)
