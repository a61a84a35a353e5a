"""HETLoRA: each device its own rank; factors are padded with zeros, and weighted by the norm of their products."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.federation.engine import Lost
from spinecli.federation.strategies.rank_tiers import ranks_by_memory
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import Assignment, Setting, Update
from spinecli.lora.aggregation.zero_padding import average_padded


class HetLoRA(AdapterServer):
    """Without HETLoRA's self-pruning of ranks."""

    def __init__(self, setting: Setting) -> None:
        tuning = setting.tuning
        self.ranks = ranks_by_memory(setting.nodes, tuning.smallest_rank, tuning.largest_rank)
        self.largest = max(self.ranks.values())
        super().__init__(setting, [self.largest] * setting.blocks)

    def assign(self, round_number: int, cohort: Sequence[str]) -> dict[str, Assignment]:
        """To each device the leading components of the global adapter."""
        return {device: self.ordered([self.ranks[device]] * self.setting.blocks) for device in cohort}

    def absorb(self, round_number: int, updates: Sequence[Update], lost: Sequence[Lost]) -> None:
        """The padded, norm-weighted mean."""
        if updates:
            self.adapter = average_padded(self.contributions(updates), self.adapter, self.largest)
            self.average_head(updates)
