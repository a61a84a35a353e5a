"""FedSpine: a bandit per device chooses how far to prune and at which rank to tune, by what past rounds were worth.

The formulas are this project's reading where the paper's are not at hand: docs/algorithms/fedspine.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import JsonValue
from torch import Tensor

from spinecli.artifacts.seeding import random_generator
from spinecli.federation.bandit import BanditState, Interval, Point, SmoothUCB, kept_importance, reward
from spinecli.federation.config import LoraConfig
from spinecli.federation.engine import Lost
from spinecli.federation.planning.artifact import LoraPlan
from spinecli.federation.strategies.pruning_server import PruningServer
from spinecli.federation.strategies.strategy import ClientUpdate, StrategyContext, TrainInstruction
from spinecli.lora.aggregation.contribution import Contribution
from spinecli.lora.aggregation.coverage import average_covered, heterogeneity_weight

RANKS = (4, 8, 12, 16, 24, 32)
"""What the bandit's second coordinate is rounded to, as far as the user's limits allow."""


class FedSpine(PruningServer):
    """S-UCB over (pruning progress, rank), LoRAPrune's importance, coverage-weighted aggregation."""

    leaves_out: ClassVar[bool] = True

    @classmethod
    def menu(
        cls, lora: LoraConfig, blocks: int, plan: LoraPlan | None, limit: int, limits: Collection[int]
    ) -> list[Sequence[int]]:
        """The allowed ranks, in all blocks."""
        return [[rank] * blocks for rank in allowed_ranks(lora.smallest_rank, lora.largest_rank)]

    def __init__(self, setting: StrategyContext) -> None:
        lora = setting.config.lora
        super().__init__(setting, [lora.largest_rank] * setting.blocks, "lora")
        self.ranks = allowed_ranks(lora.smallest_rank, lora.largest_rank)
        self._held = self.choices(setting)
        self._learners: dict[str, SmoothUCB] = {}
        self._played: dict[str, tuple[Point, float]] = {}

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """What each device's learner picks: a share of the largest step, and a rank that the device's memory holds.

        Who cannot hold the smallest rank sits out.
        """
        instructions = {}
        for device in (each for each in cohort if self._held[each]):
            point = self._learner(device).pick(
                random_generator(self.setting.config.seed, "bandit", device, round_number)
            )
            step = self.largest_step(round_number, device)
            rise = step if self.may_only_tune(round_number) else point[0] * step
            ranks = min(self._held[device], key=lambda each: abs(each[0] - point[1]))
            self._played[device] = (point, step)
            instructions[device] = self.pruning_order(round_number, device, ranks, self.ratio(device) + rise)
        return instructions

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """Reward the learners, then average every entry over the devices that have it.

        While nothing is cut yet, a play says nothing about its pruning share, so no learner hears of it.
        """
        before = {update.device: self.ratio(update.device) for update in updates}
        self.rounds_done = round_number + 1
        self.note(updates)
        if not updates:
            return
        mean_seconds = sum(update.timing.seconds for update in updates) / len(updates)
        for update in updates if not self.is_warming_up(round_number) else ():
            point, step = self._played[update.device]
            gained = (update.ratio - before[update.device]) / step if step > 0 else 0.0
            worth = reward(
                update.loss_before,
                update.loss_after,
                min(max(gained, 0.0), 1.0),
                _kept(update),
                update.timing.seconds,
                mean_seconds,
            )
            self._learner(update.device).observe(point, worth)
        self._played.clear()
        largest = self.setting.config.lora.largest_rank
        self.adapter = average_covered(heterogeneous(updates, largest), self.adapter, largest)
        self.average_head(updates)

    def _learner(self, device: str) -> SmoothUCB:
        if device not in self._learners:
            self._learners[device] = SmoothUCB(self._box())
        return self._learners[device]

    def _box(self) -> tuple[Interval, Interval]:
        lowest, highest = self.ranks[0], self.ranks[-1]
        return Interval(0.0, 1.0), Interval(float(lowest), float(max(highest, lowest + 1)))

    def values(self) -> dict[str, JsonValue]:
        """With what every learner has learned."""
        learners: dict[str, JsonValue] = {
            device: learner.state.model_dump(mode="json") for device, learner in self._learners.items()
        }
        return {**super().values(), "learners": learners}

    def recall(self, values: Mapping[str, JsonValue], tensors: Mapping[str, Tensor]) -> None:
        """With the learners."""
        super().recall(values, tensors)
        learners = values["learners"]
        assert isinstance(learners, dict)
        self._learners = {
            device: SmoothUCB(self._box(), state=BanditState.model_validate(state))
            for device, state in learners.items()
        }


def allowed_ranks(smallest: int, largest: int) -> tuple[int, ...]:
    """The ranks of FedSpine's set that lie within the user's limits, and the limits themselves."""
    return tuple(sorted({smallest, largest, *(rank for rank in RANKS if smallest < rank < largest)}))


def heterogeneous(updates: Sequence[ClientUpdate], largest_rank: int) -> list[Contribution]:
    """Contributions with the weight |D| sqrt(r / r_max) sqrt(1 - p); |D| is 1 where answers count alike."""
    return [
        replace(
            update.contribution,
            weight=heterogeneity_weight(update.weight, max(update.ranks), largest_rank, update.ratio),
        )
        for update in updates
    ]


def _kept(update: ClientUpdate) -> float:
    """Share of the importance that the device has kept."""
    assert update.masks is not None
    assert update.importance is not None
    pairs = [
        (scores, kept)
        for each, mask in zip(update.importance, update.masks.blocks, strict=True)
        for scores, kept in ((each.heads, mask.heads), (each.channels, mask.channels))
    ]
    return kept_importance([scores for scores, _ in pairs], [kept for _, kept in pairs])
