"""HETLoRA: each device its own rank; factors are padded with zeros, and weighted by the norm of their products."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from spinecli.federation.engine import Lost
from spinecli.federation.planning.artifact import LoraPlan
from spinecli.federation.strategies.rank_tiers import rank_by_memory
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import Assignment, Setting, Tuning, Update
from spinecli.lora.aggregation.zero_padding import average_padded


class HetLoRA(AdapterServer):
    """Without HETLoRA's self-pruning of ranks."""

    leaves_out: ClassVar[bool] = True

    @classmethod
    def menu(
        cls, tuning: Tuning, blocks: int, plan: LoraPlan | None, limit: int, limits: Collection[int]
    ) -> list[Sequence[int]]:
        """The rank of its tier and all below, down to the smallest."""
        tier = rank_by_memory(limit, limits, tuning.smallest_rank, tuning.largest_rank)
        return [[rank] * blocks for rank in range(tuning.smallest_rank, tier + 1)]

    def __init__(self, setting: Setting) -> None:
        self.ranks = {device: held[-1][0] for device, held in self.choices(setting).items() if held}
        self.largest = max(self.ranks.values())
        super().__init__(setting, [self.largest] * setting.blocks)

    def assign(self, round_number: int, cohort: Sequence[str]) -> dict[str, Assignment]:
        """To each device the leading components of the global adapter; who cannot hold the smallest rank sits out."""
        return {
            device: self.ordered([self.ranks[device]] * self.setting.blocks)
            for device in cohort
            if device in self.ranks
        }

    def absorb(self, round_number: int, updates: Sequence[Update], lost: Sequence[Lost]) -> None:
        """The padded, norm-weighted mean."""
        if updates:
            self.adapter = average_padded(self.contributions(updates), self.adapter, self.largest)
            self.average_head(updates)
