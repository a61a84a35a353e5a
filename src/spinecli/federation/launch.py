"""`spine fed-launch` as a library call: run the rounds, save after each, publish what they have learned."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from spinecli.artifacts.context import unheard
from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.errors import FederationError
from spinecli.evaluation.plots import can_plot
from spinecli.federation.engine import Connect
from spinecli.federation.history import (
    HISTORY_NAME,
    History,
    Measurement,
    RoundRecord,
    RunState,
    forget_state,
    load_state,
    read_history,
)
from spinecli.federation.loop import Listener, Loop, Model, ReadyFederation, Training
from spinecli.federation.request import FederatedRequest
from spinecli.federation.results import FederatedResult, require_accepted, summarised
from spinecli.federation.rounds_picture import PICTURE_NAME, save_picture


def launch(
    request: FederatedRequest,
    output: OutputOptions,
    stopwatch: Stopwatch | None = None,
    listener: Listener = unheard,
    connect: Connect | None = None,
) -> Manifest:
    """Train over the fleet into a new directory.

    Args:
        request: from `open_request`, or what `split_request` has made of that.
        connect: opens the engine that reaches the devices; None simulates the fleet in this process.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, OptionError if the fleet's memory does not hold what
    the strategy asks for, FederationError, VerificationError, and what reading can raise.
    """
    stopwatch = stopwatch or Stopwatch()
    run = Run(
        kind=request.kind,
        command="fed-launch",
        config=request.config,
        parameters=request.parameters(),
        seed=request.config.seed,
        inputs=request.inputs,
        lineage=request.lineage,
    )
    if finished := run.finished(output):
        return finished
    inputs = [request.checkpoint.path, *([request.config.plan] if request.config.plan else [])]
    check_output(output, inputs)
    request.require_memory()
    with run.working(output) as work, ExitStack() as devices:
        with stopwatch("loading"):
            engine = devices.enter_context(connect(work.state)) if connect else None
            federation = request.set_up(engine)
        history = _run_rounds(request, federation, work, stopwatch, listener)
        _require_learned(history, request.config.train.deadline, work)
        with stopwatch("writing"):
            result = _write(request, federation, history.rounds, work.files)
        return run.publish(work, _summary(request, result), result.model_dump(mode="json"), stopwatch.measured())


def _run_rounds(
    request: FederatedRequest,
    federation: ReadyFederation[Model],
    work: WorkDirectory,
    stopwatch: Stopwatch,
    listener: Listener,
) -> History:
    """All rounds that a killed run has not finished yet."""
    history = _history_so_far(work, federation.training)

    def measure(model: Model) -> Measurement:
        with stopwatch("evaluating"):
            return federation.evaluate(model)

    def look(model: Model) -> Measurement:
        with stopwatch("evaluating"):
            return federation.probe(model)

    def save(reached: RunState) -> None:
        with stopwatch("saving"):
            reached.save(work.state)

    with stopwatch("training"):
        Loop(request.config, federation.training, measure, save, look).run(history, listener)
    return history


def _history_so_far(work: WorkDirectory, training: Training[Model]) -> History:
    """The finished rounds of a killed run, whose state is taken back; none of a new run."""
    path = work.files / HISTORY_NAME
    state = load_state(work.state)
    if state is None:
        return History(path)
    training.restore(state.strategy)
    training.engine.restore(state.engine)
    return History(path, read_history(path)[: state.rounds])


def _require_learned(history: History, deadline: float | None, work: WorkDirectory) -> None:
    """Refuse to publish a run without an accepted answer; FederationError. Resumed, it begins with its first round."""
    try:
        require_accepted(history.rounds, deadline, work.files)
    except FederationError:
        forget_state(work.state)
        raise


def _write(
    request: FederatedRequest, federation: ReadyFederation[Any], rounds: Sequence[RoundRecord], directory: Path
) -> FederatedResult:
    """Everything that the directory holds beside its history."""
    groups = federation.write(directory)
    if can_plot() and rounds:
        save_picture(rounds, request.title, directory / PICTURE_NAME)
    return summarised(rounds, request.config.train.target_accuracy, groups)


def _summary(request: FederatedRequest, result: FederatedResult) -> str:
    """One line for `spine.json`."""
    found = f", accuracy {result.accuracy:.1%}" if result.accuracy is not None else ""
    return f"{request.config.strategy}, {result.rounds} rounds on {request.fleet.name}{found}"
