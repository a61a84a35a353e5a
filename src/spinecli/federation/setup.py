"""From a request to everything the rounds need: the base model, the engine with its devices, the strategy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from spinecli.errors import FederationError, OptionError
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.device import Device, DeviceMemory
from spinecli.federation.client.handle import handle
from spinecli.federation.engine import Engine
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
from spinecli.federation.simulation.local_engine import LocalEngine, Simulated
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.federation.strategies import strategy_of
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import Projection, Strategy, StrategyContext
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.factors import target_projections

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
