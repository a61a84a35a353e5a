"""What a planner of ratio and rank saves: bandits against a linear time model, on a toy fleet with nothing to train.

    python benchmarks/planners.py [--rounds 100] [--seeds 10]

Ten devices in three speed classes, 6 fast, 3 medium, 1 slow, take part in every round. A round takes device i

    T_i = slowness_i (2.4 (1 - p) + 1.9 r / 32 + 0.3) x log-normal jitter of 5 %        slowness 1, 1.5, 2

and is worth g = 1 - exp(-r / 10) - 2 p^2, which saturates in the rank r and falls with the square of the ratio p.
Bandits see a device's completion time, the mean time and the gain. The time model sees completion times, and is told
what each choice gains, where `spine` assumes a form. Ratios are free here, not monotone. `gain / time` is the sum of
all gains over the sum of all round times.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import mean, stdev
from typing import Protocol

from spinecli.federation.bandit import BanditSettings, Interval, Point, SmoothUCB
from spinecli.federation.deadline_planner import Choice, plan_under_deadline
from spinecli.federation.time_model import TimeModel

SLOWNESS = (1.0,) * 6 + (1.5,) * 3 + (2.0,)
RANKS = (4, 8, 12, 16, 24, 32)
RATIOS = tuple(step / 20 for step in range(11))
BOX = (Interval(0.0, 0.5), Interval(4.0, 32.0))
DAMPING = 0.1

Action = tuple[float, int]
"""(ratio, rank)."""


def gain(action: Action) -> float:
    ratio, rank = action
    return 1 - math.exp(-rank / 10) - 2 * ratio**2


def completion_time(slowness: float, action: Action, generator: Random) -> float:
    ratio, rank = action
    return slowness * (2.4 * (1 - ratio) + 1.9 * rank / 32 + 0.3) * math.exp(generator.gauss(0, 0.05))


def nearest(point: Point) -> Action:
    return point[0], min(RANKS, key=lambda rank: abs(rank - point[1]))


class Planner(Protocol):
    """Plans a round for all devices, then hears what came of it."""

    def plan(self) -> list[Action]:
        """An action for each device."""

    def learn(self, actions: Sequence[Action], seconds: Sequence[float]) -> None:
        """Take in what the actions took."""


class Fixed:
    """The middle of the space for everyone."""

    def plan(self) -> list[Action]:
        """The same every round."""
        return [(0.25, 16)] * len(SLOWNESS)

    def learn(self, actions: Sequence[Action], seconds: Sequence[float]) -> None:
        """Nothing."""


class Uniform(Fixed):
    """Anything."""

    def __init__(self, generator: Random) -> None:
        self._generator = generator

    def plan(self) -> list[Action]:
        """Uniform over the space."""
        draw = self._generator.uniform
        return [nearest(tuple(draw(side.low, side.high) for side in BOX)) for _ in SLOWNESS]


class Bandits:
    """A learner for each device, rewarded for gain over untimeliness."""

    def __init__(self, generator: Random, settings: BanditSettings) -> None:
        self._generator = generator
        self._learners = [SmoothUCB(BOX, settings) for _ in SLOWNESS]
        self._points: list[Point] = []

    def plan(self) -> list[Action]:
        """What each learner picks."""
        self._points = [learner.pick(self._generator) for learner in self._learners]
        return [nearest(point) for point in self._points]

    def learn(self, actions: Sequence[Action], seconds: Sequence[float]) -> None:
        """Reward each learner."""
        usual = mean(seconds)
        for learner, point, action, time in zip(self._learners, self._points, actions, seconds, strict=True):
            learner.observe(point, gain(action) / (DAMPING + abs(time - usual) / usual))


class Model:
    """A linear time model and a common deadline."""

    def __init__(self, generator: Random) -> None:
        self._model = TimeModel(max(RANKS))

    def plan(self) -> list[Action]:
        """The most gain per second that the model predicts."""
        menus = [
            [
                Choice(ratio, rank, gain((ratio, rank)), self._model.seconds(str(device), ratio, rank))
                for ratio in RATIOS
                for rank in RANKS
            ]
            for device in range(len(SLOWNESS))
        ]
        return [(choice.ratio, choice.rank) for choice in plan_under_deadline(menus).choices]

    def learn(self, actions: Sequence[Action], seconds: Sequence[float]) -> None:
        """Observe all times."""
        for device, ((ratio, rank), time) in enumerate(zip(actions, seconds, strict=True)):
            self._model.observe(str(device), ratio, rank, time)


SMOOTH = BanditSettings()
E_UCB = BanditSettings(exploration=1.0, smoothness=0.0, inherited=0.0, jitter=0.5)
PLANNERS: dict[str, Callable[[Random], Planner]] = {
    "fixed middle": lambda generator: Fixed(),
    "uniform random": Uniform,
    "E-UCB": lambda generator: Bandits(generator, E_UCB),
    "S-UCB, draws from the whole box": lambda generator: Bandits(generator, replace(SMOOTH, jitter=0.5)),
    "S-UCB": lambda generator: Bandits(generator, SMOOTH),
    "linear time model, common deadline": Model,
}


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    seconds: float
    """Summed round time."""
    idle_share: float
    gain_per_second: float


def run(make: Callable[[Random], Planner], rounds: int, seed: int) -> Outcome:
    """All planners meet the same jitter under the same seed."""
    planner, weather = make(Random(seed)), Random(seed + 1_000_000)
    total, worked, gained = 0.0, 0.0, 0.0
    for _ in range(rounds):
        actions = planner.plan()
        seconds = [
            completion_time(slowness, action, weather) for slowness, action in zip(SLOWNESS, actions, strict=True)
        ]
        planner.learn(actions, seconds)
        total += max(seconds)
        worked += mean(seconds)
        gained += sum(map(gain, actions))
    return Outcome(total, 1 - worked / total, gained / total)


def table(rounds: int, seeds: int) -> dict[str, list[Outcome]]:
    """Outcomes by planner, one for each seed."""
    return {name: [run(make, rounds, seed) for seed in range(seeds)] for name, make in PLANNERS.items()}


def spread(values: Sequence[float], form: str) -> str:
    around = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):{form}} ± {around:{form}}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    print("| planner | summed round time | idle share | gain / time |")
    print("| --- | --- | --- | --- |")
    for name, outcomes in table(arguments.rounds, arguments.seeds).items():
        seconds = spread([outcome.seconds for outcome in outcomes], ".0f")
        idle = spread([outcome.idle_share for outcome in outcomes], ".3f")
        rate = spread([outcome.gain_per_second for outcome in outcomes], ".3f")
        print(f"| {name} | {seconds} | {idle} | {rate} |")


if __name__ == "__main__":
    main()
