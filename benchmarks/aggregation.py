"""Joining adapters of different ranks: what a mean of products costs without a full-size SVD, and what padding loses.

    python benchmarks/aggregation.py [--widths 256 768 2048] [--devices 10] [--repeats 3] [--seed 0] [--threads 1]

First table: the mean of the products of all devices' factors, brought back to the largest rank, for one square
projection. `stack, QR, small SVD` is what `spine` does; `dense, full-size SVD` forms the mean and decomposes it, in
float64 as well. `difference` is that of the two products, relative to their norm.

Second table: the product of zero-padded averaging against the mean of the products with the same weights, at the
smallest width. Each device starts from the leading components of common factors and adds random factors of the same
scale, times `drift`; `independent` is random factors alone. The best product of that rank is the error that no rule
can avoid. All errors are relative Frobenius norms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from spinecli.lora.aggregation.contribution import Contribution
from spinecli.lora.aggregation.stacking import average_padded, average_products, norm_weights
from spinecli.lora.factors import Factors

NAME = "projection"
RANKS = (4, 8, 12, 16)
"""Devices take these in turns."""
DRIFTS = (0.0, 0.1, 1.0, None)
"""None: nothing in common."""


def random_factors(generator: torch.Generator, width: int) -> Factors:
    """Factors of the largest rank whose product has entries of about one size at any width."""
    rank = max(RANKS)
    return Factors(
        torch.randn(rank, width, generator=generator) / width**0.5, torch.randn(width, rank, generator=generator)
    )


def devices(count: int, width: int, seed: int, drift: float | None = None) -> list[Contribution]:
    """One contribution for each device, weighted by its number of examples, from 50 to 150."""
    generator = torch.Generator().manual_seed(seed)
    common = random_factors(generator, width)
    contributions = []
    for index in range(count):
        own = random_factors(generator, width)
        if drift is not None:
            own = Factors(common.a + drift * own.a, common.b + drift * own.b)
        examples = int(torch.randint(50, 151, (1,), generator=generator))
        contributions.append(Contribution({NAME: own.truncated(RANKS[index % len(RANKS)])}, examples))
    return contributions


def dense_mean(contributions: Sequence[Contribution]) -> Tensor:
    """The weighted mean of the products, (width, width) float64."""
    total = sum(each.weight for each in contributions)
    first = contributions[0].adapter[NAME]
    mean = torch.zeros(first.b.shape[0], first.a.shape[1], dtype=torch.float64)
    for each in contributions:
        factors = each.adapter[NAME]
        mean.addmm_(factors.b.double(), factors.a.double(), alpha=each.weight / total)
    return mean


def by_small_svd(contributions: Sequence[Contribution]) -> Factors:
    return average_products(contributions, {}, max(RANKS))[NAME]


def by_full_svd(contributions: Sequence[Contribution]) -> Factors:
    left, values, right = torch.linalg.svd(dense_mean(contributions), full_matrices=False)
    rank = max(RANKS)
    return Factors(right[:rank].float(), (left[:, :rank] * values[:rank]).float())


def timed(
    join: Callable[[Sequence[Contribution]], Factors], contributions: Sequence[Contribution], repeats: int
) -> tuple[Factors, float]:
    """What came out, and the median seconds of so many runs after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        found = join(contributions)
        taken.append(time.perf_counter() - started)
    return found, median(taken[1:])


def error(found: Factors, expected: Tensor) -> float:
    product = found.b.double() @ found.a.double()
    return float((product - expected).norm() / expected.norm())


def print_times(arguments: argparse.Namespace) -> None:
    print("| width | rank of the stack | stack, QR, small SVD | dense, full-size SVD | faster | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for width in arguments.widths:
        contributions = devices(arguments.devices, width, arguments.seed)
        stacked = sum(each.adapter[NAME].rank for each in contributions)
        found, small = timed(by_small_svd, contributions, arguments.repeats)
        expected, full = timed(by_full_svd, contributions, arguments.repeats)
        apart = error(found, expected.b.double() @ expected.a.double())
        times = f"{1000 * small:.1f} ms | {1000 * full:.0f} ms | {full / small:.0f}x"
        print(f"| {width} | {stacked} | {times} | {apart:.0e} |", flush=True)


def print_errors(arguments: argparse.Namespace) -> None:
    print("| drift | zero padding | best product of that rank |")
    print("| --- | --- | --- |")
    for drift in DRIFTS:
        contributions = devices(arguments.devices, min(arguments.widths), arguments.seed, drift)
        weights = norm_weights([each.adapter for each in contributions])
        weighted = [replace(each, weight=weight) for each, weight in zip(contributions, weights, strict=True)]
        expected = dense_mean(weighted)
        padded = error(average_padded(weighted, {}, max(RANKS))[NAME], expected)
        best = error(by_small_svd(weighted), expected)
        print(f"| {'independent' if drift is None else drift} | {padded:.1%} | {best:.1%} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768, 2048])
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_times(arguments)
    print()
    print_errors(arguments)


if __name__ == "__main__":
    main()
