"""LoRAPrune in a federation: the same ratio, rank and ramp on every device, and the plain mean of A and B.

The pruning baseline that FedSpine is measured against at equal sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.federation.engine import Lost
from spinecli.federation.strategies.pruning_server import PRUNED_BY, WARM_UP, PruningServer
from spinecli.federation.strategies.strategy import ClientUpdate, StrategyContext, TrainInstruction
from spinecli.lora.aggregation.averaging import average_factors


class FedLoRAPrune(PruningServer):
    """All devices follow one schedule, whatever their speed."""

    def __init__(self, setting: StrategyContext) -> None:
        super().__init__(setting, [setting.config.lora.rank] * setting.blocks, "lora")

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """A ratio that rises evenly with the rounds until the target is due."""
        rounds = self.setting.config.train.rounds
        cutting = max((PRUNED_BY - WARM_UP) * rounds, 1.0)
        target = self.sparsity * min(1.0, (round_number + 1 - WARM_UP * rounds) / cutting)
        ranks = [self.setting.config.lora.rank] * self.setting.blocks
        return {device: self.pruning_order(round_number, device, ranks, target) for device in cohort}

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """The mean of each row and column over the devices that still have it."""
        self.rounds_done = round_number + 1
        self.note(updates)
        if updates:
            self.adapter = average_factors(self.contributions(updates), self.adapter)
            self.average_head(updates)
