"""LEGEND: LoRA in a device's last blocks only, as deep as its observed speed allows, with ranks rising to the output.

Depths are planned anew for every cohort from what the server has observed; each block is averaged over its holders.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import ClassVar

import torch
from pydantic import JsonValue
from torch import Tensor

from spinecli.federation.config import LoraConfig
from spinecli.federation.engine import Lost
from spinecli.federation.planning.artifact import LoraPlan
from spinecli.federation.planning.config import COVERAGE, MAX_WAITING
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import ClientUpdate, StrategyContext, TrainInstruction
from spinecli.lora.aggregation.averaging import average_factors
from spinecli.lora.planning.capacity import Capacities, Capacity, Observation
from spinecli.lora.planning.configuration import Goals, configure
from spinecli.lora.planning.ranks import completion_table, rank_distribution, ranks_by_device


class Legend(AdapterServer):
    """Depths by capacity, shared rising ranks, the mean of each block over the devices that hold it."""

    leaves_out: ClassVar[bool] = True

    @classmethod
    def menu(
        cls, lora: LoraConfig, blocks: int, plan: LoraPlan | None, limit: int, limits: Collection[int]
    ) -> list[Sequence[int]]:
        """The last block, the last two, and so on."""
        ranks = _rank_distribution(lora, blocks, plan)
        placed: list[Sequence[int]] = ranks_by_device(ranks, torch.arange(1, blocks + 1)).tolist()
        return placed

    def __init__(self, setting: StrategyContext) -> None:
        self.ranks = _rank_distribution(setting.config.lora, setting.blocks, setting.plan)
        super().__init__(setting, self.ranks.tolist())
        self.classes = {node.name: node.device_class for node in setting.nodes}
        self.memory = {node.name: node.memory_bytes for node in setting.nodes}
        self.goals = _goals(setting)
        self.capacities: dict[str, Capacity] = _planned_capacities(setting)
        # smoothing holds from one round to the next: who sat a round out is planned anew
        self._last_depths: dict[str, int] = {}

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """Plan the cohort's depths; a device whose memory holds not even one block sits out."""
        limits = torch.tensor([self.memory[device] for device in cohort], dtype=torch.float64)
        holding = self._memory_by_depth()
        if self.capacities:
            known = [self._capacity(device) for device in cohort]
            previous = torch.tensor([self._last_depths.get(device, 0) for device in cohort])
            steps = self.setting.config.train.local_steps
            chosen = configure(
                lambda ranks: completion_table(Capacities.of(known), ranks, steps, holding),
                self.ranks,
                limits,
                self.goals,
                previous,
            )
            depths = chosen.depths
            self._lower_to(chosen.ranks)
        else:  # nothing is known of anyone yet: each as deep as its memory allows, which is what teaches most
            depths = (holding <= limits[:, None]).long().cumprod(dim=1).sum(dim=1)
        placed = ranks_by_device(self.ranks, depths)
        taking_part = {device: ranks for device, ranks in zip(cohort, placed, strict=True) if int(ranks.sum())}
        self._last_depths = {device: int((ranks > 0).sum()) for device, ranks in taking_part.items()}
        return {device: self.ordered(ranks.tolist()) for device, ranks in taking_part.items()}

    def _lower_to(self, ranks: Tensor) -> None:
        """Ranks that a traffic goal has lowered stay lowered, since what was cut off the adapter is gone."""
        if not torch.equal(ranks, self.ranks):
            self.ranks = ranks
            self.adapter = self.cut_to(ranks.tolist())

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """The mean of each block over its holders; what was observed updates the capacities."""
        for update in updates:
            observed = Observation(
                depth=sum(rank > 0 for rank in update.ranks),
                rank_sum=sum(update.ranks),
                steps=self.setting.config.train.local_steps,
                forward_seconds=update.forward_seconds,
                backward_seconds=update.backward_seconds,
                transferred_bytes=update.timing.bytes_down + update.timing.bytes_up,
                transfer_seconds=update.timing.download_seconds + update.timing.upload_seconds,
            ).capacity()
            before = self.capacities.get(update.device)
            self.capacities[update.device] = before.updated(observed) if before else observed
        if updates:
            self.adapter = average_factors(self.contributions(updates), self.adapter)
            self.average_head(updates)

    def _capacity(self, device: str) -> Capacity:
        """Of a device not seen yet: the mean of its class, or of the fleet if none of the class was seen."""
        if device in self.capacities:
            return self.capacities[device]
        # in the fleet's order, which a resumed run has, too
        seen = [name for name in self.classes if name in self.capacities]
        alike = [name for name in seen if self.classes[name] == self.classes[device]]
        known = [self.capacities[name] for name in alike or seen]
        return Capacity(*Capacities.of(known).matrix.mean(dim=0).tolist())

    def _memory_by_depth(self) -> Tensor:
        """Bytes of training at each depth, (blocks,) float64."""
        memory, depths = self.setting.memory, torch.arange(1, self.setting.blocks + 1)
        placed = ranks_by_device(self.ranks, depths).tolist()
        return torch.tensor([memory.needed(ranks) for ranks in placed], dtype=torch.float64)

    def values(self) -> dict[str, JsonValue]:
        """Capacities and depths."""
        capacities: dict[str, JsonValue] = {name: asdict(capacity) for name, capacity in self.capacities.items()}
        return {"capacities": capacities, "depths": dict(self._last_depths), "ranks": self.ranks.tolist()}

    def recall(self, values: Mapping[str, JsonValue], tensors: Mapping[str, Tensor]) -> None:
        """Take back capacities and depths."""
        capacities, depths, ranks = values["capacities"], values["depths"], values["ranks"]
        assert isinstance(capacities, dict)
        assert isinstance(depths, dict)
        assert isinstance(ranks, list)
        self.ranks = torch.tensor([int(str(rank)) for rank in ranks])
        self.capacities = {name: Capacity(**figures) for name, figures in capacities.items()}  # type: ignore[arg-type]
        self._last_depths = {name: int(str(depth)) for name, depth in depths.items()}


def _rank_distribution(lora: LoraConfig, blocks: int, plan: LoraPlan | None) -> Tensor:
    if plan is not None:
        return plan.tensors.rank_distribution
    return rank_distribution(blocks, lora.rank * blocks)


def _goals(setting: StrategyContext) -> Goals:
    """The plan's own goals; its traffic is that of all devices, and a cohort has its share of it."""
    if setting.plan is None:
        return Goals(MAX_WAITING, COVERAGE)
    planned = setting.plan.goals()
    if planned.traffic_budget is None:
        return planned
    return replace(
        planned, traffic_budget=planned.traffic_budget * min(1.0, setting.config.train.cohort / len(setting.nodes))
    )


def _planned_capacities(setting: StrategyContext) -> dict[str, Capacity]:
    if setting.plan is None:
        return {}
    planned = setting.plan.capacities()
    return {name: planned.single(index) for index, name in enumerate(setting.plan.devices)}
