"""What the server orders a device to do in a round, as it travels in a message's header."""

from __future__ import annotations

from pydantic import Field

from spinecli.artifacts.record import FiniteRecord
from spinecli.federation.config import ScoreName


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
