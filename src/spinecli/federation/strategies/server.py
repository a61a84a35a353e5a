"""What strategies share: a global adapter and head, kept, sent, averaged and saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from pydantic import JsonValue
from torch import Tensor

from spinecli.checkpoints.masks import Masks
from spinecli.federation.client.wire import adapter_from, adapter_tensors, head_from, head_tensors, shared_a
from spinecli.federation.config import LoraConfig
from spinecli.federation.engine import Snapshot
from spinecli.federation.planning.artifact import LoraPlan
from spinecli.federation.strategies.strategy import (
    ClientUpdate,
    DeployedModel,
    GlobalModel,
    StrategyContext,
    TrainInstruction,
)
from spinecli.lora.aggregation.averaging import average_tensors
from spinecli.lora.aggregation.contribution import Contribution
from spinecli.lora.factors import Factors, empty_b


class AdapterServer:
    """A strategy's server side with everything but its two decisions: what to order, and how to average.

    Args:
        ranks: LoRA rank of each block in the global adapter.
    """

    leaves_out: ClassVar[bool] = False
    """Whether a device that cannot hold the least of the menu sits out; otherwise no run begins with one."""

    @classmethod
    def menu(
        cls, lora: LoraConfig, blocks: int, plan: LoraPlan | None, limit: int, limits: Collection[int]
    ) -> list[Sequence[int]]:
        """What it may order a device to train, as ranks of the blocks, the least memory first.

        Args:
            limit: bytes of memory that the device has.
            limits: those of all devices.
        """
        return [[lora.rank] * blocks]

    @classmethod
    def choices(cls, setting: StrategyContext) -> dict[str, list[Sequence[int]]]:
        """By device, what of its menu its memory holds."""
        limits = sorted({node.memory_bytes for node in setting.nodes})
        held = {
            limit: setting.memory.fitting(
                cls.menu(setting.config.lora, setting.blocks, setting.plan, limit, limits), limit
            )
            for limit in limits
        }
        return {node.name: held[node.memory_bytes] for node in setting.nodes}

    def __init__(self, setting: StrategyContext, ranks: Sequence[int]) -> None:
        self.setting = setting
        self.adapter: dict[str, Factors] = {
            name: Factors(
                shared_a(setting.config.seed, name, ranks[projection.block], projection.d_in),
                empty_b(projection.d_out, ranks[projection.block]),
            )
            for name, projection in setting.projections.items()
            if ranks[projection.block] > 0
        }
        self.head: dict[str, Tensor] = dict(setting.head)

    def cut_to(self, ranks: Sequence[int]) -> dict[str, Factors]:
        """The leading components of the global adapter, as many in each block as `ranks` says."""
        return {
            name: factors.truncated(rank)
            for name, factors in self.adapter.items()
            if (rank := ranks[self.setting.projections[name].block]) > 0
        }

    def ordered(self, ranks: Sequence[int]) -> TrainInstruction:
        """Train at `ranks`, from the global adapter."""
        return TrainInstruction(tuple(ranks), self.cut_to(ranks), self.head)

    def contributions(self, updates: Sequence[ClientUpdate]) -> list[Contribution]:
        """The devices' factors in the order of the updates."""
        return [update.contribution for update in updates]

    def average_head(self, updates: Sequence[ClientUpdate]) -> None:
        """The head is the mean of the devices' heads by their weights."""
        if updates and self.head:
            self.head = average_tensors([update.head for update in updates], [update.weight for update in updates])

    def model(self) -> GlobalModel:
        """One adapter for all, and nothing cut."""
        return GlobalModel(self.adapter, self.head, [DeployedModel("all", len(self.setting.nodes), None, 0.0)])

    def masks_of(self, device: str) -> Masks | None:
        """Nothing is cut."""
        return None

    def values(self) -> dict[str, JsonValue]:
        """What a strategy keeps beside tensors; none by default."""
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors that a strategy keeps beside adapter and head; none by default."""
        return {}

    def recall(self, values: Mapping[str, JsonValue], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `values` and `tensors` gave."""

    def snapshot(self) -> Snapshot:
        """Adapter, head, and the strategy's own."""
        own = {f"own.{name}": value for name, value in self.tensors().items()}
        return Snapshot(self.values(), {**adapter_tensors(self.adapter), **head_tensors(self.head), **own})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        self.adapter = adapter_from(snapshot.tensors)
        self.head = head_from(snapshot.tensors)
        own = {name.removeprefix("own."): value for name, value in snapshot.tensors.items() if name.startswith("own.")}
        self.recall(snapshot.values, own)
