"""FedSpine improved: a time model per device and one deadline for the cohort instead of a bandit per device.

Importance is APT's, and each component of the adapter is averaged over the devices whose rank reaches it. Both are this
project's choices: docs/algorithms/fedspine.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import JsonValue
from torch import Tensor

from spinecli.federation.config import LoraConfig
from spinecli.federation.deadline_planner import MenuSettings, plan_under_deadline, pruning_menu
from spinecli.federation.engine import Lost
from spinecli.federation.planning.artifact import LoraPlan
from spinecli.federation.strategies.fedspine import allowed_ranks, heterogeneous
from spinecli.federation.strategies.pruning_server import LARGEST_STEP, PruningServer
from spinecli.federation.strategies.strategy import ClientUpdate, StrategyContext, TrainInstruction
from spinecli.federation.time_model import TimeModel, TimeModelState
from spinecli.lora.aggregation.coverage import average_covered


class FedSpineModel(PruningServer):
    """Ratio and rank from predicted completion times, APT's importance, rank-partitioned aggregation."""

    leaves_out: ClassVar[bool] = True

    @classmethod
    def menu(
        cls, lora: LoraConfig, blocks: int, plan: LoraPlan | None, limit: int, limits: Collection[int]
    ) -> list[Sequence[int]]:
        """The allowed ranks, in all blocks."""
        return [[rank] * blocks for rank in allowed_ranks(lora.smallest_rank, lora.largest_rank)]

    def __init__(self, setting: StrategyContext) -> None:
        lora = setting.config.lora
        super().__init__(setting, [lora.largest_rank] * setting.blocks, "salience", shared=True)
        self._menu = MenuSettings(
            ranks=allowed_ranks(lora.smallest_rank, lora.largest_rank),
            largest_step=LARGEST_STEP,
            saturation=lora.rank / 2,
        )
        self._first_menu = replace(self._menu, ranks=(lora.smallest_rank,))
        self._times = TimeModel(lora.largest_rank)
        self._ranks = {device: tuple(ranks[0] for ranks in held) for device, held in self.choices(setting).items()}

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """The choices with the most gain per second of the cohort's round.

        A device that was never seen gets the smallest rank: its link may be the slowest of all, and then everybody
        would wait to learn that. Who cannot hold the smallest rank sits out.
        """
        present = [device for device in cohort if self._ranks[device]]
        if not present:
            return {}
        menus = [
            pruning_menu(
                self._times,
                self._known_as(device),
                self.ratio(device),
                self.sparsity,
                self.visits_left(round_number),
                replace(self._menu, ranks=self._ranks[device]) if self._times.visits(device) else self._first_menu,
            )
            for device in present
        ]
        chosen = plan_under_deadline(menus).choices
        return {
            device: self.pruning_order(round_number, device, [choice.rank] * self.setting.blocks, choice.ratio)
            for device, choice in zip(present, chosen, strict=True)
        }

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """Learn the completion times, then average every component over the devices that have it."""
        self.rounds_done = round_number + 1
        self.note(updates)
        for update in updates:
            for name in (update.device, self._class_name(update.device)):
                self._times.observe(name, update.ratio, max(update.ranks), update.timing.seconds)
        if updates:
            largest = self.setting.config.lora.largest_rank
            self.adapter = average_covered(heterogeneous(updates, largest), self.adapter, largest, by_component=True)
            self.average_head(updates)

    def _known_as(self, device: str) -> str:
        """Whose completion times stand for a device: its own, or while it has none, those of its class."""
        return device if self._times.visits(device) else self._class_name(device)

    def _class_name(self, device: str) -> str:
        return f"class {self.class_of[device]}"

    def values(self) -> dict[str, JsonValue]:
        """With the completion times seen so far."""
        return {**super().values(), "times": self._times.state.model_dump(mode="json")}

    def recall(self, values: Mapping[str, JsonValue], tensors: Mapping[str, Tensor]) -> None:
        """With the completion times seen so far."""
        super().recall(values, tensors)
        self._times = TimeModel(
            self.setting.config.lora.largest_rank, state=TimeModelState.model_validate(values["times"])
        )
