"""Compression against the dense singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from aggregation_cases import SEEDS, assert_same_product, random_factors
from hypothesis import given
from hypothesis import strategies as st

from spinecli.lora.aggregation.stacking import compress, decompose
from spinecli.lora.factors import Factors

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(seed=SEEDS, shape=SHAPES, true_rank=st.integers(1, 16), rank=st.integers(1, 16))
def test_no_factors_of_that_rank_come_nearer(seed: int, shape: tuple[int, int], true_rank: int, rank: int) -> None:
    factors = random_factors(torch.Generator().manual_seed(seed), true_rank, shape)
    dense = factors.b.double() @ factors.a.double()
    found = compress(factors, rank)
    assert (found.a.shape, found.b.shape) == ((rank, shape[1]), (shape[0], rank))
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    unavoidable = float((dense - best).norm())
    error = float((found.b.double() @ found.a.double() - dense).norm())
    assert error <= unavoidable * (1 + 1e-5) + 1e-5 * float(dense.norm())
    share = unavoidable**2 / float(dense.norm()) ** 2
    assert decompose(factors).lost_share(rank) == pytest.approx(share, abs=1e-9)


@given(seed=SEEDS, shape=SHAPES, true_rank=st.integers(1, 6))
def test_a_sufficient_rank_is_exact(seed: int, shape: tuple[int, int], true_rank: int) -> None:
    factors = random_factors(torch.Generator().manual_seed(seed), true_rank, shape)
    assert_same_product(compress(factors, true_rank), factors.b.double() @ factors.a.double(), 1e-6)
    assert decompose(factors).lost_share(true_rank) == 0.0


@given(seed=SEEDS, rank=st.integers(2, 6), fewer=st.integers(1, 5))
def test_cutting_the_result_is_compressing_to_fewer(seed: int, rank: int, fewer: int) -> None:
    factors = random_factors(torch.Generator().manual_seed(seed), 8)
    cut, direct = compress(factors, rank).truncated(min(fewer, rank)), compress(factors, min(fewer, rank))
    assert torch.equal(cut.a, direct.a)
    assert torch.equal(cut.b, direct.b)


@given(seed=SEEDS, shape=SHAPES, true_rank=st.integers(0, 4), rank=st.integers(1, 16))
def test_every_direction_there_is_can_still_be_trained(
    seed: int, shape: tuple[int, int], true_rank: int, rank: int
) -> None:
    factors = random_factors(torch.Generator().manual_seed(seed), 5, shape)
    factors = Factors(factors.a, factors.b.index_fill(1, torch.arange(true_rank, 5), 0.0))
    found = compress(factors, rank)
    usable = min(rank, shape[1])
    alive = found.a[:usable].double()
    alive = alive / alive.norm(dim=1, keepdim=True)
    torch.testing.assert_close(alive @ alive.T, torch.eye(usable, dtype=torch.float64), atol=1e-5, rtol=0)
    assert not found.a[usable:].any()
    assert not found.b[:, min(true_rank, *shape) :].any()


def test_a_product_of_zero_keeps_rows_to_train_and_is_zero() -> None:
    factors = Factors(torch.zeros(4, 7), torch.zeros(9, 4))
    found = compress(factors, 6)
    torch.testing.assert_close(found.a @ found.a.T, torch.eye(6), atol=1e-6, rtol=0)
    assert not found.b.any()
    assert decompose(factors).lost_share(1) == 0.0


@given(seed=SEEDS)
def test_signs_and_scales_inside_the_factors_do_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(generator, 4)
    mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    mix = mix + 4 * torch.eye(4)
    other = Factors((mix @ factors.a.double()).float(), (factors.b.double() @ torch.linalg.inv(mix)).float())
    spectrum = decompose(factors)
    gap = float((spectrum.values[:4] - spectrum.values.new_tensor([*spectrum.values[1:4], 0.0])).min())
    found, expected = compress(other, 4), compress(factors, 4)
    torch.testing.assert_close(found.a, expected.a, atol=1e-4 / min(gap, 1), rtol=0)
    torch.testing.assert_close(found.b, expected.b, atol=1e-4 / min(gap, 1), rtol=0)


@given(seed=SEEDS, shape=SHAPES)
def test_the_largest_entry_of_every_row_is_positive(seed: int, shape: tuple[int, int]) -> None:
    right = decompose(random_factors(torch.Generator().manual_seed(seed), 4, shape)).right
    assert (right.gather(1, right.abs().argmax(dim=1, keepdim=True)) > 0).all()


@given(seed=SEEDS, shape=SHAPES)
def test_the_same_factors_give_the_same_bytes(seed: int, shape: tuple[int, int]) -> None:
    factors = random_factors(torch.Generator().manual_seed(seed), 4, shape)
    first, second = compress(factors, 14), compress(factors, 14)
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)


@pytest.mark.parametrize("generator_seed", [0, 1])
def test_the_completion_does_not_touch_the_global_generator(generator_seed: int) -> None:
    torch.manual_seed(generator_seed)
    state = torch.get_rng_state()
    compress(random_factors(torch.Generator().manual_seed(0), 2), 7)
    assert torch.equal(torch.get_rng_state(), state)
