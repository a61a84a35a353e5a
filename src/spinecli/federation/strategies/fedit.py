"""FedIT: LoRA of one rank in every block on every device; A and B are averaged apart."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.federation.engine import Lost
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import ClientUpdate, StrategyContext, TrainInstruction
from spinecli.lora.aggregation.averaging import average_factors


class FedIT(AdapterServer):
    """The plain way, and the measure of the others."""

    def __init__(self, setting: StrategyContext) -> None:
        super().__init__(setting, [setting.config.lora.rank] * setting.blocks)

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """The same for all."""
        ranks = [self.setting.config.lora.rank] * self.setting.blocks
        return {device: self.ordered(ranks) for device in cohort}

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """The mean of A and the mean of B by the devices' weights."""
        if updates:
            self.adapter = average_factors(self.contributions(updates), self.adapter)
            self.average_head(updates)
