"""`spine fed-launch` as a library call: run the rounds, save after each, publish what they have learned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.errors import FederationError, OptionError
from spinecli.evaluation.plots import can_plot
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.device import Device, DeviceMemory
from spinecli.federation.client.handle import handle
from spinecli.federation.deploy import deploy, merged_checkpoint, verify_deployed
from spinecli.federation.engine import Connect, Engine
from spinecli.federation.evaluation import evaluate, probe
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
from spinecli.federation.memory import (
    DeviceGroup,
    MemoryNeed,
    TrainingMemory,
    needs_of,
    objection,
    places_of,
    sitting_out,
)
from spinecli.federation.planning.workload import head_of
from spinecli.federation.request import FederatedRequest
from spinecli.federation.results import ClassResult, FederatedResult, require_accepted, summarised
from spinecli.federation.rounds import Listener, Loop
from spinecli.federation.rounds_picture import PICTURE_NAME, save_picture
from spinecli.federation.simulation.local_engine import LocalEngine, Simulated
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.federation.strategies import strategy_of
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import GlobalModel, Projection, Strategy, StrategyContext
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.factors import target_projections
from spinecli.lora.peft_format import save_adapter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Federation:
    """A run that is ready to begin."""

    base: BaseModel
    engine: Engine
    setting: StrategyContext
    strategy: Strategy


def set_up(request: FederatedRequest, engine: Engine | None = None) -> Federation:
    """Load the base model once.

    Args:
        engine: where the devices are; None lends the base model to every device of a fleet simulated in this process.

    Raises: FederationError if the devices' memory does not hold what the strategy asks of them.
    """
    config, checkpoint = request.config, request.checkpoint
    base = BaseModel(
        checkpoint,
        request.splits.train.task,
        request.labels or 0,
        config.lora.targets,
        request.train.pad_id,
        config.seed,
        request.compute,
    )
    head = head_of(checkpoint, request.labels)
    costs = TrainingCosts.of(checkpoint, base.targets, head.weights, head.per_token, head_trained=head.trained)
    engine = engine or _simulated(request, base, costs)
    setting = StrategyContext(
        config=config,
        nodes=engine.nodes(),
        projections={
            base.projection_name(index, relative): Projection(index, *base.projection(index, relative).dense_shape)
            for index in range(checkpoint.blocks)
            for relative in base.targets
            if base.checkpoint.has(index, relative)
        },
        shapes=checkpoint.shapes,
        uniform_cuts=lambda: base.cuts,
        costs=costs,
        head=base.head(),
        family=checkpoint.family,
        bytes_per_weight=request.compute.dtype.itemsize,
        plan=request.plan,
    )
    known = places_of((node.device_class, node.memory_bytes, node.examples) for node in setting.nodes)
    needs = memory_needs(request, known)
    if refused := memory_objection(request, needs):
        raise FederationError(refused)
    for note in sitting_out(needs, config.strategy):
        _LOG.warning("%s", note)
    return Federation(base, engine, setting, strategy_of(config.strategy)(setting))


def require_memory(request: FederatedRequest) -> None:
    """Raise OptionError if the memory of the request's fleet does not hold what the strategy asks of its devices."""
    if request.fleet.devices and (refused := memory_objection(request, memory_needs(request))):
        raise OptionError(refused)


def memory_needs(request: FederatedRequest, places: Sequence[DeviceGroup] | None = None) -> list[MemoryNeed]:
    """What the strategy asks of the devices' memory; empty for a strategy that does not say.

    Args:
        places: the devices that have enrolled; None: those of the request's fleet.
    """
    config, checkpoint = request.config, request.checkpoint
    places = request.places() if places is None else places
    strategy = strategy_of(config.strategy)
    if not (isinstance(strategy, type) and issubclass(strategy, AdapterServer)):
        return []
    server: type[AdapterServer] = strategy
    head = head_of(checkpoint, request.labels)
    targets = target_projections(checkpoint.family, config.lora.targets)
    costs = TrainingCosts.of(checkpoint, targets, head.weights, head.per_token, head_trained=head.trained)
    rows, length, weight = config.train.batch_size, config.data.max_length, request.compute.dtype.itemsize
    memory = TrainingMemory(costs, checkpoint.shapes, rows, length, weight)
    limits = {place.memory_bytes for place in places}

    def menu(place: DeviceGroup) -> list[Sequence[int]]:
        return server.menu(config.lora, checkpoint.blocks, request.plan, place.memory_bytes, limits)

    def least(place: DeviceGroup) -> int:
        return memory.needed(menu(place)[0])

    def most(place: DeviceGroup) -> tuple[int, str]:
        offered = menu(place)
        ranks = (memory.fitting(offered, place.memory_bytes) or offered[:1])[-1]
        return memory.needed(ranks), _in_words(ranks)

    return needs_of(places, least, most)


def memory_objection(request: FederatedRequest, needs: Sequence[MemoryNeed]) -> str | None:
    """Why a run with these needs cannot begin; None if it can."""
    name = request.config.strategy
    strategy = strategy_of(name)
    leaves_out = bool(getattr(strategy, "leaves_out", False))
    rank = "--smallest-rank" if leaves_out and name != "legend" else "--rank"
    other = "" if name == "legend" else "take legend, which trains as many blocks as each device holds, "
    remedy = f"lower --batch-size, --max-length or {rank}, {other}or name a fleet with more memory"
    return objection(needs, name, remedy, leaves_out=leaves_out)


def _in_words(ranks: Sequence[int]) -> str:
    held = [rank for rank in ranks if rank]
    span = f"rank {held[0]}" if held[0] == held[-1] else f"ranks {held[0]} to {held[-1]}"
    return f"{span} in {'all' if len(held) == len(ranks) else f'the last {len(held)} of'} {len(ranks)} blocks"


def _simulated(request: FederatedRequest, base: BaseModel, costs: TrainingCosts) -> LocalEngine[Device]:
    devices: dict[str, Simulated[Device]] = {}
    for spec, part in zip(request.fleet.devices, request.parts, strict=True):
        meter = VirtualMeter()
        device = Device(spec.name, base, costs, request.train, part, DeviceMemory(), meter)
        devices[spec.name] = Simulated(device, meter)
    return LocalEngine(request.fleet, devices, handle, request.config.seed)


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
