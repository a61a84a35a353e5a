"""What a round on one device was worth to its learner: benefit for the model over untimeliness.

The four ingredients are FedSpine's; their combination is this project's reading (see docs/algorithms/fedspine.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_SMALLEST_LOSS = 1e-12


@dataclass(frozen=True)
class RewardSettings:
    """Weights of the ingredients, and how time counts."""

    pruning: float = 0.5
    """Weight of the pruning progress (a1)."""
    importance: float = 0.5
    """Weight of the importance kept (a2)."""
    damping: float = 0.1
    """What the divisor is for a device exactly on time (delta)."""
    late_only: bool = False
    """Count only time above the mean; by default a device that is early is as untimely as one that is late."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"The damping is {self.damping}; it must be positive.")


def reward(
    loss_before: float,
    loss_after: float,
    ratio_step: float,
    importance_kept: float,
    seconds: float,
    mean_seconds: float,
    settings: RewardSettings | None = None,
) -> float:
    """R = (dL + a1 dP + a2 I) / (delta + |T - Tbar| / Tbar), dL = (loss_before - loss_after) / loss_before.

    A negative benefit is divided by delta alone: divided by more, a harmful round would look better the later it came.

    Args:
        loss_before, loss_after: on the device's own data, before and after its local steps.
        ratio_step: dP, the rise of the pruning ratio over the largest rise allowed, from 0 to 1.
        importance_kept: I, from `kept_importance`.
        seconds, mean_seconds: completion time of this device, and the mean over the cohort.

    Raises: ValueError if the mean time is not positive.
    """
    settings = settings or RewardSettings()
    if not mean_seconds > 0:
        raise ValueError(f"The mean completion time is {mean_seconds} s; it must be positive.")
    improvement = (loss_before - loss_after) / max(loss_before, _SMALLEST_LOSS)
    benefit = improvement + settings.pruning * ratio_step + settings.importance * importance_kept
    if benefit < 0:
        return benefit / settings.damping
    deviation = (seconds - mean_seconds) / mean_seconds
    untimeliness = max(deviation, 0.0) if settings.late_only else abs(deviation)
    return benefit / (settings.damping + untimeliness)


def kept_importance(scores: Sequence[Tensor], kept: Sequence[Tensor]) -> float:
    """Sum of the smoothed scores over the units that are left, over the sum over all units; 1 where nothing is known.

    Args:
        scores: smoothed importance by group of units, each (units,), not negative.
        kept: (units,) bool beside each.
    """
    everything = sum(float(score.double().sum()) for score in scores)
    left = sum(float(score.double()[mask].sum()) for score, mask in zip(scores, kept, strict=True))
    return left / everything if everything > 0 else 1.0
