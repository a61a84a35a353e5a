"""`spine fed-launch` as a library call: run the rounds, save after each, publish what they have learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.errors import FederationError
from spinecli.evaluation.plots import can_plot
from spinecli.federation.deploy import deploy, merged_checkpoint, verify_deployed
from spinecli.federation.engine import Connect
from spinecli.federation.evaluation import evaluate, probe
from spinecli.federation.history import HISTORY_NAME, History, Measurement, RoundRecord, read_history
from spinecli.federation.request import FederatedRequest
from spinecli.federation.results import ClassResult, FederatedResult, require_accepted, summarised
from spinecli.federation.rounds import Listener, Loop
from spinecli.federation.rounds_picture import PICTURE_NAME, save_picture
from spinecli.federation.setup import Federation, require_memory, set_up
from spinecli.federation.state import RunState, forget_state, load_state
from spinecli.federation.strategies.strategy import GlobalModel
from spinecli.lora.peft_format import save_adapter

DEPLOYED_DIRECTORY = "deployed"
MASKS_DIRECTORY = "masks"


def unheard(record: RoundRecord) -> None:
    """Nobody listens."""


def launch(
    request: FederatedRequest,
    output: OutputOptions,
    stopwatch: Stopwatch | None = None,
    listener: Listener = unheard,
    connect: Connect | None = None,
) -> Manifest:
    """Fine-tune over the fleet into a new directory.

    Args:
        connect: opens the engine that reaches the devices; None simulates the fleet in this process.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, OptionError if the fleet's memory does not hold what
    the strategy asks for, FederationError, VerificationError, and what reading can raise.
    """
    stopwatch = stopwatch or Stopwatch()
    run = Run(
        kind="federated-adapter",
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
    require_memory(request)
    with run.working(output) as work, ExitStack() as devices:
        with stopwatch("loading"):
            engine = devices.enter_context(connect(work.state)) if connect else None
            federation = set_up(request, engine)
        history = _run_rounds(request, federation, work, stopwatch, listener)
        require_learned(history, request.config.train.deadline, work)
        with stopwatch("writing"):
            result = _write(request, federation, history.rounds, work.files)
        return run.publish(work, summary_of(request, result), result.model_dump(mode="json"), stopwatch.measured())


def _run_rounds(
    request: FederatedRequest, federation: Federation, work: WorkDirectory, stopwatch: Stopwatch, listener: Listener
) -> History:
    """All rounds that a killed run has not finished yet."""

    def restore(state: RunState) -> None:
        federation.strategy.restore(state.strategy)
        federation.engine.restore(state.engine)

    history = history_so_far(work, restore)

    def measure(model: GlobalModel) -> Measurement:
        with stopwatch("evaluating"):
            return evaluate(federation.base, model, request.evaluation)

    def save(reached: RunState) -> None:
        with stopwatch("saving"):
            reached.save(work.state)

    def look(model: GlobalModel) -> Measurement:
        with stopwatch("evaluating"):
            return probe(federation.base, model, request.evaluation)

    loop = Loop(federation.engine, federation.strategy, federation.setting, measure, save, look)
    with stopwatch("training"):
        loop.run(history, listener)
    return history


def history_so_far(work: WorkDirectory, restore: Callable[[RunState], None]) -> History:
    """The finished rounds of a killed run, after `restore` has taken back what they left; none of a new run."""
    path = work.files / HISTORY_NAME
    state = load_state(work.state)
    if state is None:
        return History(path)
    restore(state)
    return History(path, read_history(path)[: state.rounds])


def require_learned(history: History, deadline: float | None, work: WorkDirectory) -> None:
    """Refuse to publish a run without an accepted answer; FederationError. Resumed, it begins with its first round."""
    try:
        require_accepted(history.rounds, deadline, work.files)
    except FederationError:
        forget_state(work.state)
        raise


def _write(
    request: FederatedRequest, federation: Federation, rounds: Sequence[RoundRecord], directory: Path
) -> FederatedResult:
    """Everything that the directory holds beside its history."""
    base, model, config = federation.base, federation.strategy.model(), request.config
    task_type = "SEQ_CLS" if base.task == "classification" else "CAUSAL_LM"
    save_adapter(directory, model.adapter, model.head, base.head_modules, config.model, task_type)
    for node in federation.setting.nodes:
        if (masks := federation.strategy.masks_of(node.name)) is not None:
            (directory / MASKS_DIRECTORY / node.name).mkdir(parents=True, exist_ok=True)  # a killed run may have begun
            masks.save(directory / MASKS_DIRECTORY / node.name)
    if config.pruning.deploy:
        merged = merged_checkpoint(base, model, request.splits.train.labels, request.train.pad_id)
        for served in model.served:
            place = directory / DEPLOYED_DIRECTORY / served.group
            deploy(place, merged, served)
            verify_deployed(place, base, model, served, request.evaluation)
    if can_plot() and rounds:
        save_picture(rounds, f"{config.strategy} on {request.fleet.name}", directory / PICTURE_NAME)
    groups = [ClassResult(group=each.group, devices=each.devices, ratio=each.ratio) for each in model.served]
    return summarised(rounds, config.train.target_accuracy, groups)


def summary_of(request: FederatedRequest, result: FederatedResult) -> str:
    """One line for `spine.json`."""
    found = f", accuracy {result.accuracy:.1%}" if result.accuracy is not None else ""
    return f"{request.config.strategy}, {result.rounds} rounds on {request.fleet.name}{found}"
