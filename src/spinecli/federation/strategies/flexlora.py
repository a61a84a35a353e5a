"""FlexLoRA: each device its own rank; the exact mean of the products, brought back to low rank."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.federation.engine import Lost
from spinecli.federation.strategies.hetlora import HetLoRA
from spinecli.federation.strategies.strategy import ClientUpdate
from spinecli.lora.aggregation.stacking import average_products


class FlexLoRA(HetLoRA):
    """HETLoRA's ranks with FlexLoRA's mean; a device of rank r gets the r strongest components."""

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """The mean of the products at the largest rank."""
        if updates:
            self.adapter = average_products(self.contributions(updates), self.adapter, self.largest)
            self.average_head(updates)
