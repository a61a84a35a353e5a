"""FLoRA: factors are stacked, so that the mean is exact at any ranks; it is folded into the weights every round.

Devices start each round from fresh factors on the base with everything folded in so far. A real device would keep its
own folded copy and be sent the stacks that it has missed; here it is sent their sum, in the smaller of two exact forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import JsonValue
from torch import Tensor

from spinecli.artifacts.seeding import torch_generator
from spinecli.federation.client.wire import FOLDED, adapter_from, adapter_tensors
from spinecli.federation.engine import Lost
from spinecli.federation.strategies.hetlora import HetLoRA
from spinecli.federation.strategies.strategy import ClientUpdate, GlobalModel, StrategyContext, TrainInstruction
from spinecli.lora.aggregation.stacking import compress, stack, sum_of_products
from spinecli.lora.factors import Factors, fresh_factors


class FLoRA(HetLoRA):
    """HETLoRA's ranks with FLoRA's stacking."""

    def __init__(self, setting: StrategyContext) -> None:
        super().__init__(setting)
        self.folded: dict[str, Factors] = {}

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """Fresh factors of the device's rank, on the base with the folded change."""
        self.adapter = {
            name: fresh_factors(
                projection.d_out,
                projection.d_in,
                self.largest,
                torch_generator(self.setting.config.seed, "lora", name, round_number),
            )
            for name, projection in self.setting.projections.items()
        }
        instructions = super().configure_train(round_number, cohort)
        return {device: replace(instruction, folded=self.folded) for device, instruction in instructions.items()}

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """Stack the round's factors behind what is folded already, and shorten what is longer than it is wide."""
        stacked = stack(self.contributions(updates), self.adapter) if updates else {}
        self.folded = dict(self.folded)
        for name, factors in stacked.items():
            whole = sum_of_products([self.folded[name], factors]) if name in self.folded else factors
            projection = self.setting.projections[name]
            full = min(projection.d_out, projection.d_in)
            self.folded[name] = compress(whole, full) if whole.rank > full else whole
        self.average_head(updates)

    def model(self) -> GlobalModel:
        """What is folded, as an adapter of its rank; before the first round, one that changes nothing."""
        return replace(super().model(), adapter=self.folded or self.adapter)

    def tensors(self) -> Mapping[str, Tensor]:
        """The folded change."""
        return adapter_tensors(self.folded, FOLDED)

    def recall(self, values: Mapping[str, JsonValue], tensors: Mapping[str, Tensor]) -> None:
        """Take back the folded change."""
        self.folded = adapter_from(tensors, FOLDED)
