"""One device at work: the base model it holds, its private data, what it remembers, and how its time is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from spinecli.artifacts.record import FiniteRecord
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.data.encoding import Encoded
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.local_pruning import Importance
from spinecli.federation.config import ScoreName
from spinecli.lora.cost import TrainingCosts


class PruningOrder(FiniteRecord):
    """How far to cut in this round."""

    target: float = Field(ge=0, lt=1)
    """Pruning ratio to stand at when the round's steps are used up."""
    final: float = Field(ge=0, lt=1)
    """Pruning ratio that all rounds lead to."""
    interval: int = Field(ge=1)
    """Local steps between cuts."""
    score: ScoreName
    collect_only: bool = False
    """Measure importance without cutting."""
    cut_first: bool = False
    """Cut to the target before the first step, by the importance that came with the order; otherwise on the ramp."""


class TrainingOrder(FiniteRecord):
    """One round of local training."""

    round: int = Field(ge=0)
    seed: int = Field(ge=0)
    acknowledged: int | None = Field(default=None, ge=0)
    """The last round of this device whose answer the server has accepted."""
    ranks: tuple[int, ...]
    """LoRA rank of each block; 0: none."""
    scale: float = Field(gt=0)
    """LoRA's alpha / rank, the same at every rank."""
    shared_a: bool = False
    """A is frozen, drawn from `seed` on every device, and never travels (FFA-LoRA)."""
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    clip_norm: float = Field(gt=0)
    """Gradients are scaled down to this norm; what the training then does is still checked for NaN."""
    pruning: PruningOrder | None = None


_PENDING = "pending."
_PENDING_ROUND = "pending_round"


class Meter(Protocol):
    """Counts a device's working time: from FLOPs on a virtual clock, by a stopwatch on a real device."""

    def charge(self, phase: str, flops: float) -> None:
        """The work since the last charge belonged to `phase` and took `flops` operations."""

    def seconds(self, phase: str) -> float:
        """Seconds charged to `phase` in this job."""


@dataclass(eq=False)
class DeviceMemory:
    """What stays on a device from round to round: its masks and importance. Empty before its first pruning.

    What a round has cut is pending until the server shows that it has heard of it. If the answer was late or refused,
    the server still counts with the old masks, and the cut is undone, since its factors would not fit.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Settled ones by their names, pending ones under `pending.`."""

    def settle(self, acknowledged: int | None) -> None:
        """Keep what is pending if the server has acknowledged the round that it comes from; otherwise drop it.

        Args:
            acknowledged: the last round whose answer the server has accepted.
        """
        pending_round = self.tensors.pop(_PENDING_ROUND, None)
        pending = {
            name.removeprefix(_PENDING): value for name, value in self.tensors.items() if name.startswith(_PENDING)
        }
        settled = {name: value for name, value in self.tensors.items() if not name.startswith(_PENDING)}
        heard = pending_round is not None and acknowledged == int(pending_round)
        self.tensors = pending if heard else settled

    def masks(self, dense: Sequence[BlockShape]) -> Masks:
        """The units this device still has of blocks of these shapes."""
        if "mask.0.heads" not in self.tensors:
            return Masks.full(dense)
        return masks_from(self.tensors, len(dense))

    def importance(self, blocks: int, dense: BlockShape) -> list[Importance]:
        """Smoothed scores of every block."""
        if "importance.0.heads" not in self.tensors:
            return [Importance.zeros(dense) for _ in range(blocks)]
        return importance_from(self.tensors, blocks)

    def remember(self, round_number: int, masks: Masks, importance: Sequence[Importance] = ()) -> None:
        """What a round has cut, until it is settled; with the importance if the device is to start from its own."""
        fresh = {**mask_tensors(masks), **importance_tensors(importance)}
        self.tensors |= {_PENDING + name: value for name, value in fresh.items()}
        self.tensors[_PENDING_ROUND] = torch.tensor(round_number)


def mask_tensors(masks: Masks) -> dict[str, Tensor]:
    """Masks as named tensors, for a message or a file."""
    return {
        f"mask.{index}.{unit}": value.clone()
        for index, mask in enumerate(masks.blocks)
        for unit, value in (("heads", mask.heads), ("channels", mask.channels))
    }


def masks_from(tensors: dict[str, Tensor], blocks: int) -> Masks:
    """The masks that `mask_tensors` made."""
    return Masks(
        tuple(BlockMask(tensors[f"mask.{index}.heads"], tensors[f"mask.{index}.channels"]) for index in range(blocks))
    )


def importance_tensors(importance: Sequence[Importance]) -> dict[str, Tensor]:
    """Importance as named tensors, for a message or a file."""
    return {
        f"importance.{index}.{unit}": value.clone()
        for index, scores in enumerate(importance)
        for unit, value in (("heads", scores.heads), ("channels", scores.channels))
    }


def importance_from(tensors: Mapping[str, Tensor], blocks: int) -> list[Importance]:
    """The importance that `importance_tensors` made."""
    return [
        Importance(tensors[f"importance.{index}.heads"], tensors[f"importance.{index}.channels"])
        for index in range(blocks)
    ]


@dataclass(frozen=True, eq=False)
class Device:
    """Everything that local work needs."""

    name: str
    base: BaseModel
    costs: TrainingCosts
    data: Encoded
    indices: Sequence[int]
    """The examples that are this device's own."""
    memory: DeviceMemory
    meter: Meter

    def abandon(self) -> None:
        """Nothing that it does outlasts a message."""


def mask_shapes(blocks: int, dense: BlockShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `mask_tensors` makes."""
    return _unit_shapes("mask", blocks, dense)


def importance_shapes(blocks: int, dense: BlockShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `importance_tensors` makes."""
    return _unit_shapes("importance", blocks, dense)


def _unit_shapes(what: str, blocks: int, dense: BlockShape) -> dict[str, tuple[int, ...]]:
    return {
        f"{what}.{index}.{unit}": (size,)
        for index in range(blocks)
        for unit, size in (("heads", dense.heads), ("channels", dense.channels))
    }
