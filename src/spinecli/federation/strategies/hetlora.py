"""HETLoRA: each device its own rank; factors are padded with zeros, and weighted by the norm of their products."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from spinecli.federation.config import LoraConfig
from spinecli.federation.engine import Lost, Node
from spinecli.federation.planning.artifact import LoraPlan
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import ClientUpdate, StrategyContext, TrainInstruction
from spinecli.lora.aggregation.stacking import average_padded


def ranks_by_memory(nodes: Sequence[Node], smallest: int, largest: int) -> dict[str, int]:
    """A rank for every device, see `rank_by_memory`."""
    sizes = {node.memory_bytes for node in nodes}
    ranks = {size: rank_by_memory(size, sizes, smallest, largest) for size in sizes}
    return {node.name: ranks[node.memory_bytes] for node in nodes}


def rank_by_memory(size: int, sizes: Collection[int], smallest: int, largest: int) -> int:
    """A rank: from `smallest` for the least memory in the fleet to `largest` for the most.

    Classes in between are spread evenly, whatever the distances between their memories; a fleet of one class gets the
    middle. Source: HETLoRA leaves the choice of ranks open; this is this project's.

    Args:
        size: bytes of the device.
        sizes: those of all devices.
    """
    rising = sorted(set(sizes))
    if len(rising) == 1:
        return round((smallest + largest) / 2)
    step = (largest - smallest) / (len(rising) - 1)
    return round(smallest + rising.index(size) * step)


class HetLoRA(AdapterServer):
    """Without HETLoRA's self-pruning of ranks."""

    leaves_out: ClassVar[bool] = True

    @classmethod
    def menu(
        cls, lora: LoraConfig, blocks: int, plan: LoraPlan | None, limit: int, limits: Collection[int]
    ) -> list[Sequence[int]]:
        """The rank of its tier and all below, down to the smallest."""
        tier = rank_by_memory(limit, limits, lora.smallest_rank, lora.largest_rank)
        return [[rank] * blocks for rank in range(lora.smallest_rank, tier + 1)]

    def __init__(self, setting: StrategyContext) -> None:
        self.ranks = {device: held[-1][0] for device, held in self.choices(setting).items() if held}
        self.largest = max(self.ranks.values())
        super().__init__(setting, [self.largest] * setting.blocks)

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """To each device the leading components of the global adapter; who cannot hold the smallest rank sits out."""
        return {
            device: self.ordered([self.ranks[device]] * self.setting.blocks)
            for device in cohort
            if device in self.ranks
        }

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """The padded, norm-weighted mean."""
        if updates:
            self.adapter = average_padded(self.contributions(updates), self.adapter, self.largest)
            self.average_head(updates)
