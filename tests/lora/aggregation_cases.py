"""Random contributions for the aggregation tests, and dense means to hold against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from spinecli.lora.aggregation.contribution import Contribution
from spinecli.lora.factors import Factors

NAME = "layers.0.q_proj"
SHAPE = (9, 7)
SEEDS = st.integers(0, 9999)
WEIGHTS = st.lists(st.floats(0.1, 100), min_size=1, max_size=4)


def random_factors(generator: torch.Generator, rank: int, shape: tuple[int, int] = SHAPE) -> Factors:
    return Factors(
        torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5,
        torch.randn(shape[0], rank, generator=generator),
    )


def contributions_of(
    seed: int, weights: Sequence[float], ranks: Sequence[int], shape: tuple[int, int] = SHAPE
) -> list[Contribution]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Contribution({NAME: random_factors(generator, rank, shape)}, weight)
        for weight, rank in zip(weights, ranks, strict=True)
    ]


def random_units(generator: torch.Generator, units: int, share: float) -> Tensor:
    """Rising indices of about `share` of the units, at least one."""
    kept = (torch.rand(units, generator=generator) < share).nonzero().flatten()
    return kept if len(kept) else torch.tensor([0])


def mean_product(contributions: Sequence[Contribution], name: str = NAME) -> Tensor:
    """sum w_i B_i A_i over the holders, dense, in float64."""
    holders = [holder for holder in contributions if name in holder.adapter]
    total = sum(holder.weight for holder in holders)
    products = [holder.adapter[name].b.double() @ holder.adapter[name].a.double() for holder in holders]
    return sum(
        (product * holder.weight / total for product, holder in zip(products, holders, strict=True)),
        torch.zeros_like(products[0]),
    )


def assert_same_product(factors: Factors, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the larger side's norm."""
    found = factors.b.double() @ factors.a.double()
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * max(float(expected.norm()), 1.0)
