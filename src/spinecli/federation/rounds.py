"""A round of adapters: draw a cohort, order, exchange, check, learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spinecli.artifacts.seeding import random_generator
from spinecli.errors import FederationError, MessageError
from spinecli.federation.client.device import PruningOrder, TrainingOrder, importance_tensors
from spinecli.federation.client.handle import TRAIN
from spinecli.federation.client.wire import FOLDED, adapter_tensors, head_tensors, outputs_tensors
from spinecli.federation.engine import Engine, Job, Lost, Node, Reply, Snapshot
from spinecli.federation.history import DeviceRecord, RoundRecord
from spinecli.federation.loop import RoundStart, named
from spinecli.federation.messages import Message, require_finite
from spinecli.federation.strategies.strategy import (
    ClientUpdate,
    GlobalModel,
    Strategy,
    StrategyContext,
    TrainInstruction,
)
from spinecli.federation.updates import checked_update


def draw_cohort(nodes: Sequence[Node], size: int, seed: int, round_number: int) -> list[str]:
    """`size` devices drawn without replacement, in the fleet's order; all of them if there are no more."""
    names = [node.name for node in nodes]
    if size >= len(names):
        return names
    drawn = set(random_generator(seed, "cohort", round_number).sample(names, size))
    return [name for name in names if name in drawn]


@dataclass(frozen=True, eq=False)
class AdapterTraining:
    """Everything that rounds of adapters need."""

    engine: Engine
    strategy: Strategy
    setting: StrategyContext

    @property
    def model(self) -> GlobalModel:
        """The strategy's."""
        return self.strategy.model()

    def snapshot(self) -> Snapshot:
        """The strategy's."""
        return self.strategy.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        self.strategy.restore(snapshot)

    def play(self, start: RoundStart) -> RoundRecord:
        """One round; one that every device sits out takes no time.

        Raises: FederationError if a device would be asked for more than its memory holds, or if what the answers have
        led to gives no finite numbers.
        """
        config, setting, number = self.setting.config, self.setting, start.number
        cohort = draw_cohort(setting.nodes, config.train.cohort, config.seed, number)
        instructions = self.strategy.configure_train(number, cohort)
        self._require_memory(instructions)
        jobs = [self._job(start, device, instruction) for device, instruction in instructions.items()]
        began = self.engine.now()
        outcomes = self.engine.exchange(jobs, config.train.deadline)
        ended = self.engine.now()
        updates: list[ClientUpdate] = []
        lost: list[Lost] = []
        devices = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            instruction = instructions[job.device]
            checked = self._checked(outcome, instruction, began)
            if isinstance(checked, ClientUpdate):
                updates.append(checked)
            else:
                lost.append(checked)
            ratio = checked.ratio if isinstance(checked, ClientUpdate) else self._ratio(job.device)
            devices.append(_device_record(job.device, instruction, outcome, checked, ended, ratio))
        self._absorb(start, updates, lost)
        return RoundRecord(
            round=number,
            began=began,
            ended=ended,
            learning_rate=start.learning_rate,
            devices=tuple(devices),
        )

    def _absorb(self, start: RoundStart, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """Learn from the answers.

        Every answer is finite by itself; what many of them come to over the rounds needs not be.
        """
        try:
            self.strategy.aggregate_train(start.number, updates, lost)
            require_finite(self.strategy.snapshot().tensors)
        except (MessageError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            what = str(error).rstrip(".") if isinstance(error, MessageError) else "its factors have no decomposition"
            raise start.diverged(f"{what}, from {named([update.device for update in updates])}") from error

    def _require_memory(self, instructions: Mapping[str, TrainInstruction]) -> None:
        """Whatever a strategy orders, no device is asked for more than it has said that it holds."""
        memory = self.setting.memory
        needed = {ranks: memory.needed(ranks) for ranks in {each.ranks for each in instructions.values()}}
        for node in self.setting.nodes:
            found = instructions.get(node.name)
            if found is not None and needed[found.ranks] > node.memory_bytes:
                raise FederationError(
                    f"{node.name} has {node.memory_bytes / 1e9:.3g} GB and would need "
                    f"{needed[found.ranks] / 1e9:.3g} GB for the strategy's instruction; lower --batch-size or "
                    "--max-length, or name a fleet with more memory."
                )

    def _ratio(self, device: str) -> float:
        """Where a device stands whose answer is lost: where it stood before."""
        cuts, masks = self.setting.cuts, self.strategy.masks_of(device)
        return cuts.ratio_of(cuts.widths_of(masks)) if masks else 0.0

    def _job(self, start: RoundStart, device: str, instruction: TrainInstruction) -> Job:
        config, pruning = self.setting.config, instruction.pruning
        order = TrainingOrder(
            round=start.number,
            seed=config.seed,
            acknowledged=start.acknowledged.get(device),
            ranks=instruction.ranks,
            scale=config.lora.scale,
            shared_a=instruction.shared_a,
            steps=config.train.local_steps,
            batch_size=config.train.batch_size,
            learning_rate=start.learning_rate,
            clip_norm=config.train.clip_norm,
            pruning=None
            if pruning is None
            else PruningOrder(
                target=pruning.target,
                final=pruning.final,
                interval=config.pruning.prune_interval,
                score=pruning.score,
                collect_only=pruning.collect_only,
                cut_first=pruning.importance is not None,
            ),
        )
        factors = outputs_tensors(instruction.adapter) if instruction.shared_a else adapter_tensors(instruction.adapter)
        tensors = {**factors, **head_tensors(instruction.head), **adapter_tensors(instruction.folded, FOLDED)}
        if pruning is not None and pruning.importance is not None:
            tensors |= importance_tensors(pruning.importance)
        return Job(device, TRAIN, start.number, Message(order.model_dump(mode="json"), tensors))

    def _checked(self, outcome: Reply | Lost, instruction: TrainInstruction, began: float) -> ClientUpdate | Lost:
        if isinstance(outcome, Lost):
            return outcome
        try:
            return checked_update(outcome, instruction, self.setting, self.strategy.masks_of(outcome.device))
        except MessageError as error:
            timing = outcome.timing
            return Lost(outcome.device, "refused", str(error), timing.arrived - began, timing.bytes_down)


def _device_record(
    device: str,
    instruction: TrainInstruction,
    outcome: Reply | Lost,
    checked: ClientUpdate | Lost,
    ended: float,
    ratio: float,
) -> DeviceRecord:
    held = [rank for rank in instruction.ranks if rank > 0]
    depth, rank = len(held), sum(held) / max(len(held), 1)
    update = checked if isinstance(checked, ClientUpdate) else None
    lost = checked if isinstance(checked, Lost) else None
    timing = outcome.timing if isinstance(outcome, Reply) else None
    return DeviceRecord(
        device=device,
        lost=lost.reason if lost else None,
        explanation=lost.explanation if lost else "",
        download_seconds=timing.download_seconds if timing else 0.0,
        compute_seconds=timing.compute_seconds if timing else 0.0,
        upload_seconds=timing.upload_seconds if timing else 0.0,
        waiting_seconds=ended - timing.arrived if timing else 0.0,
        bytes_down=timing.bytes_down if timing else outcome.bytes_down if isinstance(outcome, Lost) else 0,
        bytes_up=timing.bytes_up if timing else 0,
        loss_before=update.loss_before if update else None,
        loss_after=update.loss_after if update else None,
        ratio=ratio,
        depth=depth,
        rank=rank,
    )
