"""What the control module of split federated learning saves, and what it takes: cohorts, batches, nothing to train.

    python benchmarks/split_control.py [--fleets 80,800,8000] [--seeds 3] [--rounds 200]

Fleets are jetson-N in the conditions of their first round. A row is 64 tokens through two blocks of the size of
BERT-base (14.2 million weights, six operations a weight and token), its features are 64 x 768 numbers of four bytes, up
and down. Each device has 60 examples of ten labels on average, at least 16, dealt by the scheme. A cohort has at most a
quarter of the fleet's devices, and at most `--rows` rows for each device of the fleet; batches are at most 64. All
devices have the same priority, except in the last table, where it follows from the rounds before.

The tables: divergence of the merged labels for cohorts that fit the same budget, the mean of 20 draws for `random`;
waiting in the cohort that greedy descent chooses, in percent of an iteration; seconds of one thread; and, over many
rounds on the smallest fleet, how often devices take part and what the whole plan reaches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

import torch
from torch import Tensor

from spinecli.data.examples import Dataset, Example
from spinecli.federation.config import SplitConfig, TrainConfig
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.simulation.fleet import Fleet, load_fleet
from spinecli.federation.simulation.partition import Partition, parse_partition, partition
from spinecli.federation.split.control.batches import idle_share, regulated_batches, scaled_up
from spinecli.federation.split.control.estimates import Pace, Paces, Population
from spinecli.federation.split.control.plan import ControlOptions, ControlState, plan_round
from spinecli.federation.split.control.refinement import Problem, refined
from spinecli.federation.split.control.selection.candidates import Candidates
from spinecli.federation.split.control.selection.registry import RandomSelection, selection_of

LABELS = 10
LARGEST_BATCH, DIVERGENCE_LIMIT = 64, 0.05
EQUAL_BATCH = 16
ROW_FLOPS = 6 * 14.2e6 * 64
ROW_BITS = 8 * 4 * 64 * 768
SEARCHES = ("genetic", "greedy")
RANDOM_DRAWS = 20


@dataclass(frozen=True)
class Case:
    """A fleet with its data, under one seed."""

    fleet: Fleet
    population: Population
    seed: int
    budget_rows: float

    @property
    def largest_cohort(self) -> int:
        """A quarter of the fleet."""
        return len(self.population.names) // 4

    def paces(self, round_number: int) -> list[Pace]:
        """What each device's iterations take in a round."""
        now = [conditions(device, self.seed, round_number) for device in self.fleet.devices]
        return [
            Pace(
                each.compute_seconds(ROW_FLOPS),
                ROW_BITS / each.up_bits_per_second + ROW_BITS / each.down_bits_per_second,
                2 * each.latency_seconds,
            )
            for each in now
        ]

    def candidates(self, paces: Paces) -> Candidates:
        """Everybody, with the batch of Eq. 9 and the same priority."""
        population = self.population
        return Candidates(
            regulated_batches(paces, LARGEST_BATCH, population.limits.clamp(max=LARGEST_BATCH)),
            population.distributions,
            population.reference,
            torch.ones(len(population.names), dtype=torch.float64),
            self.budget_rows,
            self.largest_cohort,
        )

    def problem(self, candidates: Candidates, cohort: Tensor, paces: Paces) -> Problem:
        """Eq. 14 for a cohort."""
        return Problem(
            candidates.batches[cohort],
            candidates.distributions[cohort],
            candidates.reference,
            paces.row_seconds[cohort],
            self.population.limits[cohort].clamp(max=LARGEST_BATCH),
            self.budget_rows,
            DIVERGENCE_LIMIT,
        )


def case(devices: int, scheme: Partition, seed: int, rows: float) -> Case:
    fleet = load_fleet(f"jetson-{devices}")
    examples = tuple(Example("", label=index % LABELS) for index in range(60 * devices))
    dataset = Dataset("classification", examples, tuple(map(str, range(LABELS))), "made")
    parts = partition(dataset, devices, scheme, seed, minimum=16)
    counts = torch.stack(
        [torch.bincount(torch.tensor([index % LABELS for index in part]), minlength=LABELS) for part in parts]
    )
    names = [device.name for device in fleet.devices]
    population = Population(names, [device.device_class.name for device in fleet.devices], counts)
    return Case(fleet, population, seed, rows * devices)


@dataclass
class Figures:
    """What is measured of one case."""

    divergences: dict[str, float]
    refined: dict[str, float]
    feasible: dict[str, float]
    sizes: dict[str, int]
    idle: dict[str, float]
    seconds: dict[str, float]


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def measure(found: Case) -> Figures:
    figures = Figures({}, {}, {}, {}, {}, {})
    paces = Paces.of(found.paces(0))
    limits = found.population.limits.clamp(max=LARGEST_BATCH)
    _, figures.seconds["batches"] = timed(lambda: regulated_batches(paces, LARGEST_BATCH, limits))
    candidates = found.candidates(paces)
    draws = torch.Generator().manual_seed(found.seed)
    problems = [
        found.problem(candidates, RandomSelection().select(candidates, draws), paces) for _ in range(RANDOM_DRAWS)
    ]
    figures.sizes["random"] = round(mean(len(problem.batches) for problem in problems))
    figures.divergences["random"] = mean(float(problem.divergence(problem.batches)) for problem in problems)
    started = time.perf_counter()
    outcomes = [refined(problem) for problem in problems]
    figures.seconds["refinement"] = (time.perf_counter() - started) / RANDOM_DRAWS
    figures.refined["random"] = mean(outcome.divergence for outcome in outcomes)
    figures.feasible["random"] = mean(outcome.feasible for outcome in outcomes)
    for name in SEARCHES:
        generator = torch.Generator().manual_seed(found.seed)
        search = selection_of(name)
        cohort, figures.seconds[name] = timed(lambda s=search, g=generator: s.select(candidates, g))  # type: ignore[misc]
        problem = found.problem(candidates, cohort, paces)
        outcome = refined(problem)
        figures.sizes[name] = len(cohort)
        figures.divergences[name] = float(problem.divergence(problem.batches))
        figures.refined[name] = outcome.divergence
        figures.feasible[name] = float(outcome.feasible)

    # `greedy` came last: cohort, problem and outcome are its own
    def bound(batches: Tensor) -> bool:
        return float(problem.divergence(batches)) <= max(DIVERGENCE_LIMIT, outcome.divergence)

    raised, figures.seconds["scaling"] = timed(
        lambda: scaled_up(outcome.batches, problem.limits, LARGEST_BATCH, found.budget_rows, bound)
    )
    stages = {
        "equal": problem.limits.clamp(max=EQUAL_BATCH),
        "Eq. 9": problem.batches,
        "refined": outcome.batches,
        "raised": raised,
    }
    for name, batches in stages.items():
        figures.idle[name] = idle_share(paces.of_cohort(cohort).durations(batches))
    state = ControlState(paces=dict(zip(found.population.names, found.paces(0), strict=True)))
    split = SplitConfig(largest_batch=LARGEST_BATCH, divergence_limit=DIVERGENCE_LIMIT)
    options = ControlOptions(split, TrainConfig(cohort=found.largest_cohort), found.budget_rows)
    started = time.perf_counter()
    plan_round(state, found.population, options, found.seed, 0)
    figures.seconds["whole plan"] = time.perf_counter() - started
    return figures


PLANS = {
    "random, equal batches": ControlOptions(regulation=False, by_labels=False),
    "random, without refinement": ControlOptions(by_labels=False),
    "random": ControlOptions(SplitConfig(selection="random")),
    "priority": ControlOptions(SplitConfig(selection="priority")),
    "genetic": ControlOptions(SplitConfig(selection="genetic")),
    "greedy": ControlOptions(SplitConfig(selection="greedy")),
}


def rehearse(found: Case, options: ControlOptions, rounds: int) -> list[float]:
    """A run without training: every pace is known as it is, and everybody completes every round."""
    state = ControlState()
    plans = []
    for round_number in range(rounds):
        paces = dict(zip(found.population.names, found.paces(round_number), strict=True))
        state = state.model_copy(update={"paces": paces})
        plan = plan_round(state, found.population, options, found.seed, round_number)
        state = state.after_round({}, plan.cohort)
        plans.append(plan)
    taken = state.counts(found.population).double()
    return [
        mean(plan.divergence for plan in plans),
        mean(plan.divergence <= DIVERGENCE_LIMIT for plan in plans),
        mean(plan.start_batch < LARGEST_BATCH and options.regulation for plan in plans),
        mean(len(plan.cohort) for plan in plans),
        mean(plan.rows for plan in plans),
        mean(plan.idle_share or 0.0 for plan in plans),
        sum(plan.rows for plan in plans) / sum(plan.seconds or 0.0 for plan in plans),
        float(taken.min()),
        float(taken.max()),
    ]


def spread(values: Sequence[float], form: str) -> str:
    around = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):{form}} ± {around:{form}}"


def heading(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", default="80,800,8000", help="numbers of devices")
    parser.add_argument("--partitions", default="dirichlet:0.1,shards:1,shards:2")
    parser.add_argument("--rows", type=float, default=3.0, help="of the ingress budget, for each device of the fleet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=200, help="of the last table; 0 leaves it out")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    schemes = {text: parse_partition(text) for text in asked.partitions.split(",")}
    sizes = [int(size) for size in asked.fleets.split(",")]
    results = {
        (size, text): [measure(case(size, scheme, seed, asked.rows)) for seed in range(asked.seeds)]
        for size in sizes
        for text, scheme in schemes.items()
    }
    heading(
        "devices", "labels", "random", "genetic", "greedy", "random, refined", "genetic, refined", "greedy, refined"
    )
    for (size, text), figures in results.items():
        cells = [spread([each.divergences[name] for each in figures], ".4f") for name in ("random", *SEARCHES)]
        for name in ("random", *SEARCHES):
            reached = mean(each.feasible[name] for each in figures)
            cells.append(f"{mean(each.refined[name] for each in figures):.4f} ({reached:.0%} within the limit)")
        print(f"| {size} | {text} | {' | '.join(cells)} |")
    stages = ("equal", "Eq. 9", "refined", "raised")
    heading(
        "devices", "labels", *(f"cohort, {name}" for name in ("random", *SEARCHES)), *(f"idle, {s}" for s in stages)
    )
    for (size, text), figures in results.items():
        cells = [f"{mean(each.sizes[name] for each in figures):.0f}" for name in ("random", *SEARCHES)]
        cells += [spread([100 * each.idle[stage] for each in figures], ".1f") for stage in stages]
        print(f"| {size} | {text} | {' | '.join(cells)} |")
    steps = ("batches", *SEARCHES, "refinement", "scaling", "whole plan")
    heading("devices", "labels", *(f"{step}, ms" for step in steps))
    for (size, text), figures in results.items():
        cells = [f"{1e3 * mean(each.seconds[step] for each in figures):.1f}" for step in steps]
        print(f"| {size} | {text} | {' | '.join(cells)} |")
    if asked.rounds:
        heading(
            "labels",
            "plan",
            "KL",
            "within the limit",
            "from smaller batches",
            "devices",
            "rows",
            "idle",
            "rows a second",
            f"rounds of {asked.rounds} for the rarest and the most frequent device",
        )
        for text, scheme in schemes.items():
            cases = [case(sizes[0], scheme, seed, asked.rows) for seed in range(asked.seeds)]
            for name, options in PLANS.items():
                fitted = [
                    replace(options, budget_rows=each.budget_rows, train=TrainConfig(cohort=each.largest_cohort))
                    for each in cases
                ]
                runs = [rehearse(each, one, asked.rounds) for each, one in zip(cases, fitted, strict=True)]
                kl, within, smaller, devices, rows, idle, speed, rarest, most = zip(*runs, strict=True)
                print(
                    f"| {text} | {name} | {spread(kl, '.4f')} | {mean(within):.0%} | {mean(smaller):.0%} | "
                    f"{mean(devices):.1f} | {mean(rows):.0f} | {mean(idle):.1%} | {spread(speed, '.1f')} | "
                    f"{mean(rarest):.0f} to {mean(most):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
