"""Ratio and rank for every device of a cohort under one common deadline, from predicted completion times.

The model-based alternative to a bandit (this project's, see docs/algorithms/fedspine.md): nobody waits for a device
that could have been given less to do, and nobody idles who could have trained a higher rank meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from spinecli.federation.time_model import TimeModel


@dataclass(frozen=True)
class Choice:
    """One thing a device could do in a round."""

    ratio: float
    """Pruning ratio at the end of the round."""
    rank: int
    gain: float
    """What it is worth to the global model, in arbitrary units."""
    seconds: float
    """Predicted completion time."""


@dataclass(frozen=True)
class DeadlinePlan:
    """A choice for each device, in the order of the menus."""

    choices: tuple[Choice, ...]

    @property
    def deadline(self) -> float:
        """Predicted seconds of the slowest device."""
        return max(choice.seconds for choice in self.choices)

    @property
    def idle_share(self) -> float:
        """Predicted share of the round that devices wait: 1 - mean T_i / max T_i."""
        return 1 - sum(choice.seconds for choice in self.choices) / len(self.choices) / self.deadline


@dataclass(frozen=True)
class MenuSettings:
    """What a device may be asked to do, and what it is thought to be worth."""

    ranks: tuple[int, ...] = (4, 8, 12, 16, 24, 32)
    largest_step: float = 0.1
    """Most that the ratio may rise in one round, unless the target could not be reached in time (dp_max)."""
    steps: int = 4
    """Into how many parts the possible rises are divided."""
    saturation: float = 8.0
    """Rank at which 63 % of the gain of an infinite rank is reached."""
    pruning_weight: float = 0.5
    """Loss of gain when the ratio rises by `largest_step` more or less than the pace."""


def plan_under_deadline(menus: Sequence[Sequence[Choice]]) -> DeadlinePlan:
    """The choices with the most total gain per second of the round, max over T of  sum_i g_i(T) / max_i t_i(T).

    Under a deadline T each device takes its best choice that is predicted to be done by T. Every predicted time is
    tried as T, from the earliest by which each device has something to do.

    Raises: ValueError if there is no device, or a device has no choice.
    """
    if not menus or not all(menus):
        raise ValueError("A plan needs at least one device, and at least one choice for each.")
    quickest = max(min(choice.seconds for choice in menu) for menu in menus)
    current: list[Choice | None] = [None] * len(menus)
    best: tuple[Choice, ...] = ()
    best_rate = -math.inf
    offers = [(device, choice) for device, menu in enumerate(menus) for choice in menu]
    offers.sort(key=lambda offer: offer[1].seconds)
    for deadline, arriving in groupby(offers, key=lambda offer: offer[1].seconds):
        for device, choice in arriving:
            held = current[device]
            if held is None or choice.gain > held.gain:
                current[device] = choice
        if deadline < quickest:
            continue
        chosen = tuple(choice for choice in current if choice is not None)
        rate = sum(choice.gain for choice in chosen) / max(choice.seconds for choice in chosen)
        if rate > best_rate:
            best, best_rate = chosen, rate
    return DeadlinePlan(best)


def pruning_menu(
    model: TimeModel, device: str, ratio: float, target: float, visits_left: float, settings: MenuSettings
) -> list[Choice]:
    """Everything that a device on its way to the target ratio may do in this round.

        gain(step, r) = 1 - exp(-r / saturation) - weight ((step - pace) / largest)^2
        pace          = (target - p) / visits_left

    Harm that grows with the square of a step is least when all steps are equal, which is the pace. A device too slow
    for the deadline may run ahead of it; one that could no longer reach the target afterwards may not fall behind.

    Args:
        ratio: p, reached so far.
        visits_left: rounds this device can expect to take part in until it must stand at the target, this one included.
    """
    remaining, visits = max(target - ratio, 0.0), max(visits_left, 1.0)
    pace = remaining / visits
    largest = max(settings.largest_step, pace)
    most = min(largest, remaining)
    least = min(max(remaining - largest * (visits - 1), 0.0), most)
    grid = {least + (most - least) * part / settings.steps for part in range(settings.steps + 1)}
    return [
        Choice(
            ratio=ratio + step,
            rank=rank,
            gain=1 - math.exp(-rank / settings.saturation) - settings.pruning_weight * ((step - pace) / largest) ** 2,
            seconds=model.seconds(device, ratio + step, rank),
        )
        for step in sorted(grid | {min(max(pace, least), most)})
        for rank in settings.ranks
    ]
