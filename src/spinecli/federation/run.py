"""Everything that a run of adapters is made of, from its request, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.device import Device, DeviceMemory
from spinecli.federation.client.handle import handle
from spinecli.federation.deploy import deploy, merged_checkpoint, verify_deployed
from spinecli.federation.engine import Engine
from spinecli.federation.evaluation import evaluate, probe
from spinecli.federation.history import Measurement
from spinecli.federation.planning.workload import head_of
from spinecli.federation.results import ClassResult
from spinecli.federation.rounds import AdapterTraining
from spinecli.federation.simulation.local_engine import simulated
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.federation.strategies import strategy_of
from spinecli.federation.strategies.strategy import GlobalModel, Projection, Strategy, StrategyContext
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.peft_format import save_adapter

if TYPE_CHECKING:
    from spinecli.federation.request import FederatedRequest

DEPLOYED_DIRECTORY = "deployed"
MASKS_DIRECTORY = "masks"


@dataclass(frozen=True, eq=False)
class Federation:
    """A run that is ready to begin."""

    request: FederatedRequest
    base: BaseModel
    engine: Engine
    setting: StrategyContext
    strategy: Strategy

    @property
    def training(self) -> AdapterTraining:
        """Its rounds."""
        return AdapterTraining(self.engine, self.strategy, self.setting)

    def evaluate(self, model: GlobalModel) -> Measurement:
        """The model on what is held out, as each group of devices would run it."""
        return evaluate(self.base, model, self.request.evaluation)

    def probe(self, model: GlobalModel) -> Measurement:
        """The same on the first few rows."""
        return probe(self.base, model, self.request.evaluation)

    def write(self, directory: Path) -> list[ClassResult]:
        """The adapter, the masks, and the deployed checkpoints if they are asked for; what each group would run.

        Raises: VerificationError.
        """
        base, model, request = self.base, self.strategy.model(), self.request
        task_type = "SEQ_CLS" if base.task == "classification" else "CAUSAL_LM"
        save_adapter(directory, model.adapter, model.head, base.head_modules, request.config.model, task_type)
        for node in self.setting.nodes:
            if (masks := self.strategy.masks_of(node.name)) is not None:
                place = directory / MASKS_DIRECTORY / node.name
                place.mkdir(parents=True, exist_ok=True)  # a killed run may have begun
                masks.save(place)
        if request.config.pruning.deploy:
            merged = merged_checkpoint(base, model, request.splits.train.labels, request.train.pad_id)
            for served in model.served:
                place = directory / DEPLOYED_DIRECTORY / served.group
                deploy(place, merged, served)
                verify_deployed(place, base, model, served, request.evaluation)
        return [ClassResult(group=each.group, devices=each.devices, ratio=each.ratio) for each in model.served]


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
    data = request.train

    def device(name: str, part: Sequence[int], memory: DeviceMemory, meter: VirtualMeter) -> Device:
        return Device(name, base, costs, data, part, memory, meter)

    engine = engine or simulated(request.fleet, data, request.parts, device, handle, config.seed)
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
    request.require_memory_of(setting.nodes)
    return Federation(request, base, engine, setting, strategy_of(config.strategy)(setting))
