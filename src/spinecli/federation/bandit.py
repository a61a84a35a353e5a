"""S-UCB: a tree of boxes over a continuous action space, refined where it is played; one learner per device.

Formulas: FedSpine's text names the ingredients, their form here is this project's reading; see
docs/algorithms/fedspine.md. A learner draws nothing by itself: every pick is given its generator.

What a round on one device was worth to its learner: benefit for the model over untimeliness.

The four ingredients are FedSpine's; their combination is this project's reading (see docs/algorithms/fedspine.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from torch import Tensor

from spinecli.artifacts.record import Record

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


_STANDARDISATION_WINDOW = 20

Point = tuple[float, ...]
"""One coordinate for each interval of the box."""


@dataclass(frozen=True)
class Interval:
    """[low, high); the upper end of the whole box belongs to it too."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """Length of the interval."""
        return self.high - self.low


@dataclass(frozen=True)
class BanditSettings:
    """How a learner explores. FedMP's E-UCB, its parent: exploration 1, smoothness 0, inherited 0, jitter 0.5."""

    discount: float = 0.99
    """What a reward is still worth one play later (lambda)."""
    exploration: float = 0.1
    """Weight of the uncertainty bonus (c0)."""
    smoothness: float = 0.1
    """How much the best reward inside a box may exceed its mean, for a box as large as the space (nu)."""
    granularity: tuple[float, ...] = (0.1, 0.15)
    """Sides up to this share of the space's sides are not cut any more (theta)."""
    jitter: float = 0.1
    """Plays lie within this share of the box's sides around its centre; 0.5 draws from the whole box."""
    inherited: float = 0.5
    """Share of a cut box's statistics that each of its two halves starts with."""

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1:
            raise ValueError(f"The discount is {self.discount}; it must be above 0 and at most 1.")
        if not 0 <= self.jitter <= 0.5 or not 0 <= self.inherited <= 0.5:
            raise ValueError("Jitter and inherited share must be between 0 and 0.5.")
        if min(self.exploration, self.smoothness) < 0 or min(self.granularity) <= 0:
            raise ValueError("Exploration and smoothness must not be negative, and granularity must be positive.")


class Leaf(Record):
    """A box that is not cut, and what was seen in it."""

    box: tuple[Interval, ...]
    count: float = 0.0
    """Discounted number of plays (n)."""
    total: float = 0.0
    """Discounted sum of squashed rewards (s)."""

    @property
    def mean(self) -> float:
        """Discounted mean of the squashed rewards; 0 before the first."""
        return self.total / self.count if self.count > 0 else 0.0

    def contains(self, point: Point, space: Sequence[Interval]) -> bool:
        """Whether the point lies in the box; the upper end of the space counts as inside."""
        return all(
            side.low <= x and (x < side.high or x == side.high == whole.high)
            for x, side, whole in zip(point, self.box, space, strict=True)
        )


class RewardScale(Record):
    """Running mean and variance of the raw rewards, to squash them into (0, 1)."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def with_reward(self, reward: float) -> RewardScale:
        """After one more reward, which enters with weight 1 / min(k, 20)."""
        count = self.count + 1
        step = 1 / min(count, _STANDARDISATION_WINDOW)
        mean = self.mean + step * (reward - self.mean)
        variance = self.variance + step * ((reward - self.mean) * (reward - mean) - self.variance)
        return RewardScale(count=count, mean=mean, variance=max(variance, 0.0))

    def squashed(self, reward: float) -> float:
        """logistic((R - m) / sd): 0.5 for a reward like the recent ones."""
        if self.variance == 0:
            return 0.5
        standard = (reward - self.mean) / math.sqrt(self.variance)
        return 1 / (1 + math.exp(-max(min(standard, 500.0), -500.0)))


class BanditState(Record):
    """All that a learner has learned; written as JSON and read again, it is the same learner to the last bit."""

    leaves: tuple[Leaf, ...]
    rewards: RewardScale = RewardScale()


class SmoothUCB:
    """One device's learner over a box of actions.

        R~  = logistic((R - m_R) / sd_R)
        U   = s / n + c0 sqrt(2 ln(max(sum n, e)) / n) + nu diameter(box),     infinite where n = 0

    The leaf of largest U is played near its centre. Then all statistics fade by the discount, the leaf's n rises by 1
    and its s by R~, and a box with a side above the granularity is cut across the side that exceeds it most, at the
    played point but inside the middle half.

    Raises: ValueError if the box is empty or the granularity does not fit its dimensions.
    """

    def __init__(
        self,
        box: Sequence[Interval],
        settings: BanditSettings | None = None,
        state: BanditState | None = None,
    ) -> None:
        self.box = tuple(box)
        self.settings = settings or BanditSettings()
        if len(self.settings.granularity) != len(self.box):
            raise ValueError(f"{len(self.box)} intervals need as many granularities.")
        if any(not side.width > 0 for side in self.box):
            raise ValueError("Every interval must have its upper end above its lower end.")
        start = state or BanditState(leaves=(Leaf(box=self.box),))
        self._leaves = list(start.leaves)
        self._rewards = start.rewards

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The boxes that partition the space."""
        return tuple(self._leaves)

    @property
    def state(self) -> BanditState:
        """For `SmoothUCB(box, settings, state)` to go on from."""
        return BanditState(leaves=self.leaves, rewards=self._rewards)

    def pick(self, generator: Random) -> Point:
        """The next action. Changes nothing: a play whose outcome never arrives leaves no trace."""
        bounds = [self._upper_bound(leaf) for leaf in self._leaves]
        best = max(bounds)
        leaf = generator.choice([leaf for leaf, bound in zip(self._leaves, bounds, strict=True) if bound == best])
        jitter = self.settings.jitter
        drawn = (side.low + side.width * (0.5 + jitter * generator.uniform(-1, 1)) for side in leaf.box)
        return tuple(min(max(x, side.low), side.high) for x, side in zip(drawn, leaf.box, strict=True))

    def observe(self, point: Point, reward: float) -> None:
        """Take in the outcome of an action. ValueError if the point is outside the box or the reward not finite."""
        if not math.isfinite(reward):
            raise ValueError(f"The reward is {reward}; it must be finite.")
        played = next((i for i, leaf in enumerate(self._leaves) if leaf.contains(point, self.box)), None)
        if played is None:
            raise ValueError(f"{point} is outside the space of actions.")
        self._rewards = self._rewards.with_reward(reward)
        fade = self.settings.discount
        self._leaves = [Leaf(box=leaf.box, count=leaf.count * fade, total=leaf.total * fade) for leaf in self._leaves]
        leaf = self._leaves[played]
        leaf = Leaf(box=leaf.box, count=leaf.count + 1, total=leaf.total + self._rewards.squashed(reward))
        self._leaves[played : played + 1] = self._cut(leaf, point)

    def _upper_bound(self, leaf: Leaf) -> float:
        if leaf.count == 0:
            return math.inf
        plays = max(sum(other.count for other in self._leaves), math.e)
        bonus = self.settings.exploration * math.sqrt(2 * math.log(plays) / leaf.count)
        return leaf.mean + bonus + self.settings.smoothness * self._diameter(leaf)

    def _diameter(self, leaf: Leaf) -> float:
        """Diagonal of a box whose sides are measured in the space's sides, 1 for the whole space."""
        return math.sqrt(sum(share**2 for share in self._shares(leaf)) / len(self.box))

    def _shares(self, leaf: Leaf) -> list[float]:
        return [side.width / whole.width for side, whole in zip(leaf.box, self.box, strict=True)]

    def _cut(self, leaf: Leaf, point: Point) -> list[Leaf]:
        """The leaf, or its two halves."""
        excess = [share / most for share, most in zip(self._shares(leaf), self.settings.granularity, strict=True)]
        dimension = max(range(len(excess)), key=excess.__getitem__)
        side = leaf.box[dimension]
        quarter = side.width / 4
        place = min(max(point[dimension], side.low + quarter), side.high - quarter)
        if excess[dimension] <= 1 or not side.low < place < side.high:
            return [leaf]
        share = self.settings.inherited
        return [
            Leaf(
                box=(*leaf.box[:dimension], half, *leaf.box[dimension + 1 :]),
                count=leaf.count * share,
                total=leaf.total * share,
            )
            for half in (Interval(side.low, place), Interval(place, side.high))
        ]
