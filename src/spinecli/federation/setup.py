"""From a request to everything the rounds need: the base model, the engine with its devices, the strategy."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.federation.device.base_model import BaseModel
from spinecli.federation.device.device import Device, DeviceMemory
from spinecli.federation.device.handle import handle
from spinecli.federation.engine import Engine
from spinecli.federation.engines.local import LocalEngine, Simulated
from spinecli.federation.engines.virtual_clock import VirtualMeter
from spinecli.federation.planning.workload import head_of
from spinecli.federation.request import FederatedRequest
from spinecli.federation.strategies import strategy_of
from spinecli.federation.strategies.strategy import Projection, Setting, Strategy
from spinecli.lora.cost import TrainingCosts


@dataclass(frozen=True, eq=False)
class Federation:
    """A run that is ready to begin."""

    base: BaseModel
    engine: Engine
    setting: Setting
    strategy: Strategy


def set_up(request: FederatedRequest, engine: Engine | None = None) -> Federation:
    """Load the base model once.

    Args:
        engine: where the devices are; None lends the base model to every device of a fleet simulated in this process.
    """
    options, checkpoint = request.options, request.checkpoint
    base = BaseModel(
        checkpoint,
        request.splits.train.task,
        request.labels or 0,
        options.targets,
        request.train.pad_id,
        options.seed,
        options.compute,
    )
    head = head_of(checkpoint, request.labels)
    costs = TrainingCosts.of(checkpoint, base.targets, head.weights, head.per_token, head_trained=head.trained)
    engine = engine or _simulated(request, base, costs)
    setting = Setting(
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
        tuning=options.tuning,
        seed=options.seed,
        head=base.head(),
        cohort=options.cohort,
        family=checkpoint.family,
        bytes_per_weight=options.compute.dtype.itemsize,
        plan=request.plan,
    )
    return Federation(base, engine, setting, strategy_of(options.strategy)(setting))


def _simulated(request: FederatedRequest, base: BaseModel, costs: TrainingCosts) -> LocalEngine[Device]:
    devices: dict[str, Simulated[Device]] = {}
    for spec, part in zip(request.fleet.devices, request.parts, strict=True):
        meter = VirtualMeter()
        device = Device(spec.name, base, costs, request.train, part, DeviceMemory(), meter)
        devices[spec.name] = Simulated(device, meter)
    return LocalEngine(request.fleet, devices, handle, request.options.seed)
