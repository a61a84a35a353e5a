"""The round loop: draw a cohort, order, exchange, check, learn, measure, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from spinecli.artifacts.stopwatch import return_freed_memory
from spinecli.errors import FederationError, MessageError
from spinecli.federation.client.device import PruningOrder, TrainingOrder, importance_tensors
from spinecli.federation.client.handle import TRAIN
from spinecli.federation.client.wire import FOLDED, adapter_tensors, head_tensors, outputs_tensors
from spinecli.federation.config import TrainConfig
from spinecli.federation.engine import Engine, Job, Lost, Node, Reply
from spinecli.federation.history import DeviceRecord, History, Measurement, RoundRecord, RunState
from spinecli.federation.messages import Message, require_finite
from spinecli.federation.schedule import learning_rate
from spinecli.federation.seeding import random_generator
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


_LOG = logging.getLogger(__name__)
_MOST_NAMED = 5


class Listener(Protocol):
    """Hears of every finished round."""

    def __call__(self, record: RoundRecord) -> None:
        """`record` is in the history and the state is saved."""


@dataclass(frozen=True, eq=False)
class Loop:
    """Everything the rounds need."""

    engine: Engine
    strategy: Strategy
    setting: StrategyContext
    evaluate: Callable[[GlobalModel], Measurement]
    save: Callable[[RunState], None]
    probe: Callable[[GlobalModel], Measurement] | None = None
    """Measures on a few rows, in rounds that are not evaluated, whether the model still gives numbers."""

    def run(self, history: History, listener: Listener) -> None:
        """Run what rounds are left after those in the history. A round that every device sits out takes no time.

        Raises: FederationError if a device would be asked for more than its memory holds, or if what the answers of a
        round have led to gives no finite numbers; the state saved is then that of the round before.
        """
        acknowledged = {
            device.device: record.round for record in history.rounds for device in record.devices if device.lost is None
        }

        def play(number: int) -> RoundRecord:
            return self._round(number, acknowledged)

        def keep(finished: int) -> None:
            self.save(RunState(finished, self.strategy.snapshot(), self.engine.snapshot()))

        run_rounds(self.setting.config.train, history, play, keep, listener)

    def _round(self, number: int, acknowledged: dict[str, int]) -> RoundRecord:
        config, setting = self.setting.config, self.setting
        cohort = draw_cohort(setting.nodes, config.train.cohort, config.seed, number)
        instructions = self.strategy.configure_train(number, cohort)
        self._require_memory(instructions)
        rate = learning_rate(config.learning_rate, config.train.schedule, number, config.train.rounds)
        jobs = [
            self._job(number, device, instruction, rate, acknowledged.get(device))
            for device, instruction in instructions.items()
        ]
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
                acknowledged[job.device] = number
            else:
                lost.append(checked)
            ratio = checked.ratio if isinstance(checked, ClientUpdate) else self._ratio(job.device)
            devices.append(_device_record(job.device, instruction, outcome, checked, ended, ratio))
        evaluation = self._absorbed(number, updates, lost)
        return RoundRecord(
            round=number,
            began=began,
            ended=ended,
            learning_rate=rate,
            evaluation=evaluation,
            devices=tuple(devices),
        )

    def _absorbed(self, number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> Measurement | None:
        """Learn from the answers; what is measured of the new model where that is due.

        Every answer is finite by itself; what many of them come to over the rounds needs not be.
        """
        answered = [update.device for update in updates]
        try:
            self.strategy.aggregate_train(number, updates, lost)
            require_finite(self.strategy.snapshot().tensors)
        except (MessageError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            what = str(error).rstrip(".") if isinstance(error, MessageError) else "its factors have no decomposition"
            raise diverged(number, self.setting.config.train.rounds, f"{what}, from {named(answered)}") from error
        return measured(self.setting.config.train, number, self.strategy.model(), answered, self.evaluate, self.probe)

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

    def _job(
        self, number: int, device: str, instruction: TrainInstruction, rate: float, acknowledged: int | None
    ) -> Job:
        config, pruning = self.setting.config, instruction.pruning
        order = TrainingOrder(
            round=number,
            seed=config.seed,
            acknowledged=acknowledged,
            ranks=instruction.ranks,
            scale=config.lora.scale,
            shared_a=instruction.shared_a,
            steps=config.train.local_steps,
            batch_size=config.train.batch_size,
            learning_rate=rate,
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
        return Job(device, TRAIN, number, Message(order.model_dump(mode="json"), tensors))

    def _checked(self, outcome: Reply | Lost, instruction: TrainInstruction, began: float) -> ClientUpdate | Lost:
        if isinstance(outcome, Lost):
            return outcome
        try:
            return checked_update(outcome, instruction, self.setting, self.strategy.masks_of(outcome.device))
        except MessageError as error:
            timing = outcome.timing
            return Lost(outcome.device, "refused", str(error), timing.arrived - began, timing.bytes_down)


def run_rounds(
    train: TrainConfig,
    history: History,
    play: Callable[[int], RoundRecord],
    keep: Callable[[int], None],
    listener: Listener,
) -> None:
    """Run what rounds are left after those in the history, up to the target accuracy.

    Every device whose answer is refused is named in a note when that happens for the first time.

    Args:
        play: runs the round of this number.
        keep: saves what so many finished rounds have left.
    """
    refused: set[str] = set()
    for number in range(len(history.rounds), train.rounds):
        if _reached_target(history.rounds, train.target_accuracy):
            return
        record = play(number)
        history.append(record)
        keep(number + 1)
        return_freed_memory()
        for device in record.devices:
            if device.lost == "refused" and device.device not in refused:
                refused.add(device.device)
                _LOG.warning("round %d goes on without %s: %s", number + 1, device.device, device.explanation)
        listener(record)


_Model = TypeVar("_Model")


def measured(
    train: TrainConfig,
    number: int,
    model: _Model,
    answered: Sequence[str],
    evaluate: Callable[[_Model], Measurement],
    probe: Callable[[_Model], Measurement] | None,
) -> Measurement | None:
    """What is measured of a round's model where that is due; in other rounds only that a few rows give numbers.

    Args:
        answered: devices that the model has learned from in this round.

    Raises: FederationError if its loss is no finite number.
    """
    due = train.evaluates(number)
    look = evaluate if due else probe
    found = None if look is None else look(model)
    if found is not None and not math.isfinite(found.loss):
        raise diverged(number, train.rounds, f"its loss on held-out data is {found.loss}, after {named(answered)}")
    return found if due else None


def diverged(number: int, rounds: int, what: str) -> FederationError:
    """The end of a run whose numbers have left the finite range in this round.

    Args:
        what: the numbers, and whose they are.
    """
    return FederationError(
        f"The model has diverged in round {number + 1} of {rounds}: {what}; nothing is published and the rounds before "
        "are kept, so --resume tries this one again, or start over with --overwrite and a lower --learning-rate."
    )


def named(devices: Sequence[str]) -> str:
    """Devices in a sentence: the first few by name."""
    shown, more = list(devices[:_MOST_NAMED]), len(devices) - _MOST_NAMED
    parts = [*shown, f"{more} others"] if more > 0 else shown
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "no device"


def _reached_target(rounds: Sequence[RoundRecord], target: float | None) -> bool:
    """Whether the last round was measured at `target` or above."""
    last = rounds[-1].evaluation if rounds else None
    return target is not None and last is not None and last.accuracy >= target


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
