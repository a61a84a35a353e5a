"""What each rule promises about the mean of the products, on the ordinary case without masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from aggregation_cases import (
    NAME,
    SEEDS,
    SHAPE,
    WEIGHTS,
    assert_same_product,
    contributions_of,
    mean_product,
    random_factors,
)
from hypothesis import given
from hypothesis import strategies as st

from spinecli.lora.aggregation.averaging import average_factors, average_tensors
from spinecli.lora.aggregation.contribution import Contribution, resized
from spinecli.lora.aggregation.coverage import average_covered
from spinecli.lora.aggregation.stacking import average_padded, average_products, norm_weights, product_norm, stack
from spinecli.lora.factors import Adapter, Factors

Rule = Callable[[Sequence[Contribution], Adapter], dict[str, Factors]]
RANK = max(SHAPE)
"""High enough for any mean of this shape."""

EXACT: dict[str, Rule] = {
    "stacking": stack,
    "products": lambda contributions, previous: average_products(contributions, previous, RANK),
    "coverage": lambda contributions, previous: average_covered(contributions, previous, RANK),
    "coverage by component": lambda contributions, previous: average_covered(
        contributions, previous, RANK, by_component=True
    ),
}
KEEPING: dict[str, Rule] = {
    "averaging": average_factors,
    "zero padding": lambda contributions, previous: average_padded(contributions, previous, 3),
    **{name: rule for name, rule in EXACT.items() if name != "stacking"},
}
every_exact_rule = pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT.keys())
every_rule = pytest.mark.parametrize("rule", [*KEEPING.values(), stack], ids=[*KEEPING.keys(), "stacking"])


@every_exact_rule
@given(seed=SEEDS, weights=WEIGHTS, rank=st.integers(1, 5))
def test_equal_ranks_give_the_weighted_mean_of_the_products(
    rule: Rule, seed: int, weights: list[float], rank: int
) -> None:
    contributions = contributions_of(seed, weights, [rank] * len(weights))
    previous = {NAME: random_factors(torch.Generator().manual_seed(seed + 1), rank)}
    assert_same_product(rule(contributions, previous)[NAME], mean_product(contributions))


@pytest.mark.parametrize("name", ["stacking", "products"])
@given(seed=SEEDS, data=st.data(), weights=WEIGHTS)
def test_stacking_and_products_are_exact_at_any_ranks(
    name: str, seed: int, data: st.DataObject, weights: list[float]
) -> None:
    ranks = data.draw(st.lists(st.integers(1, 8), min_size=len(weights), max_size=len(weights)))
    contributions = contributions_of(seed, weights, ranks)
    assert_same_product(EXACT[name](contributions, {})[NAME], mean_product(contributions))


@given(seed=SEEDS, weights=WEIGHTS)
def test_stacking_has_the_sum_of_the_ranks(seed: int, weights: list[float]) -> None:
    ranks = [1 + index % 3 for index in range(len(weights))]
    assert stack(contributions_of(seed, weights, ranks), {})[NAME].rank == sum(ranks)


@given(seed=SEEDS, weights=WEIGHTS, rank=st.integers(1, 4))
def test_products_at_a_low_rank_lose_no_more_than_any_approximation_must(
    seed: int, weights: list[float], rank: int
) -> None:
    contributions = contributions_of(seed, weights, [3] * len(weights))
    exact = mean_product(contributions)
    found = average_products(contributions, {}, rank)[NAME].product().double()
    unavoidable = torch.linalg.svdvals(exact)[rank:].norm()
    assert float((found - exact).norm()) == pytest.approx(float(unavoidable), rel=1e-4, abs=1e-5)


@given(seed=SEEDS, weights=WEIGHTS, rank=st.integers(1, 4))
def test_averaging_is_the_mean_of_each_factor(seed: int, weights: list[float], rank: int) -> None:
    contributions = contributions_of(seed, weights, [rank] * len(weights))
    found = average_factors(contributions, {})[NAME]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for side in ("a", "b"):
        stacked = torch.stack([getattr(holder.adapter[NAME], side).double() for holder in contributions])
        torch.testing.assert_close(getattr(found, side), torch.tensordot(shares, stacked, 1).float())


@given(seed=SEEDS, weights=WEIGHTS, rank=st.integers(1, 4))
def test_a_shared_a_stays_bit_for_bit_and_makes_averaging_exact(seed: int, weights: list[float], rank: int) -> None:
    contributions = contributions_of(seed, weights, [rank] * len(weights))
    shared = contributions[0].adapter[NAME].a
    contributions = [
        replace(holder, adapter={NAME: Factors(shared, holder.adapter[NAME].b)}) for holder in contributions
    ]
    found = average_factors(contributions, {NAME: random_factors(torch.Generator().manual_seed(seed), rank)})[NAME]
    assert torch.equal(found.a, shared)
    assert_same_product(found, mean_product(contributions))


@given(seed=SEEDS, weights=WEIGHTS)
def test_devices_that_agree_are_returned_as_they_are(seed: int, weights: list[float]) -> None:
    [one] = contributions_of(seed, [1.0], [3])
    found = average_factors([replace(one, weight=weight) for weight in weights], {})[NAME]
    assert torch.equal(found.a, one.adapter[NAME].a)
    assert torch.equal(found.b, one.adapter[NAME].b)


def test_averaging_refuses_different_ranks() -> None:
    with pytest.raises(ValueError, match=r"ranks \[2, 3\]"):
        average_factors(contributions_of(0, [1, 1], [2, 3]), {})


@pytest.mark.parametrize("rule", KEEPING.values(), ids=KEEPING.keys())
@given(seed=SEEDS)
def test_projections_nobody_holds_keep_their_very_tensors(rule: Rule, seed: int) -> None:
    previous = {"layers.9.q_proj": random_factors(torch.Generator().manual_seed(seed), 3)}
    found = rule(contributions_of(seed, [1, 2], [3, 3]), previous)
    assert found["layers.9.q_proj"] is previous["layers.9.q_proj"]
    assert found.keys() == {"layers.9.q_proj", NAME}


@every_exact_rule
@given(seed=SEEDS)
def test_devices_that_do_not_hold_a_projection_do_not_count_in_its_mean(rule: Rule, seed: int) -> None:
    holders = contributions_of(seed, [1, 2], [3, 3])
    elsewhere = replace(contributions_of(seed + 1, [1.5], [3])[0], adapter={})
    assert_same_product(rule([holders[0], elsewhere, holders[1]], {})[NAME], mean_product(holders))


@given(seed=SEEDS)
def test_averaging_leaves_out_devices_that_do_not_hold_a_projection(seed: int) -> None:
    holders = contributions_of(seed, [1, 2], [3, 3])
    with_another = average_factors([*holders, Contribution({}, 5.0)], {})[NAME]
    without = average_factors(holders, {})[NAME]
    assert torch.equal(with_another.a, without.a)
    assert torch.equal(with_another.b, without.b)


@every_rule
@given(seed=SEEDS)
def test_the_same_input_gives_the_same_bytes(rule: Rule, seed: int) -> None:
    runs = [rule(contributions_of(seed, [1, 2, 3], [3, 3, 3]), {})[NAME] for _ in range(2)]
    assert torch.equal(runs[0].a, runs[1].a)
    assert torch.equal(runs[0].b, runs[1].b)
    assert runs[0].a.dtype == runs[0].b.dtype == torch.float32


@every_rule
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_the_order_of_devices_does_not_change_the_product(rule: Rule, seed: int, order: list[int]) -> None:
    contributions = contributions_of(seed, [1, 2, 3, 4], [3] * 4)
    expected = rule(contributions, {})[NAME].product().double()
    assert_same_product(rule([contributions[index] for index in order], {})[NAME], expected)


@given(seed=SEEDS, rank=st.integers(1, 6))
def test_the_norm_of_a_product_needs_no_product(seed: int, rank: int) -> None:
    factors = random_factors(torch.Generator().manual_seed(seed), rank)
    assert product_norm(factors) == pytest.approx(float(factors.product().norm()), rel=1e-5)


@given(seed=SEEDS, ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_zero_padding_is_the_mean_of_padded_factors_weighted_by_norm(seed: int, ranks: list[int]) -> None:
    contributions = contributions_of(seed, [1.0] * len(ranks), ranks)
    norms = torch.tensor([float(holder.adapter[NAME].product().norm()) for holder in contributions])
    shares = norms / norms.sum()
    assert norm_weights([holder.adapter for holder in contributions]) == pytest.approx(shares.tolist(), rel=1e-4)
    found = average_padded(contributions, {}, 6)[NAME]
    padded = [resized(holder.adapter[NAME], 6) for holder in contributions]
    torch.testing.assert_close(found.a, torch.tensordot(shares, torch.stack([part.a for part in padded]), 1))
    torch.testing.assert_close(found.b, torch.tensordot(shares, torch.stack([part.b for part in padded]), 1))


def test_zero_padding_of_fresh_factors_weighs_all_alike() -> None:
    fresh = {NAME: Factors(torch.ones(2, 7), torch.zeros(9, 2))}
    assert norm_weights([fresh, fresh]) == [0.5, 0.5]
    assert not average_padded([Contribution(fresh, 1), Contribution(fresh, 3)], {}, 4)[NAME].b.any()


def test_zero_padding_is_not_the_mean_of_the_products_when_ranks_differ() -> None:
    contributions = contributions_of(1, [1, 1, 1], [2, 4, 6])
    exact = mean_product(contributions)
    error = (average_padded(contributions, {}, 6)[NAME].product() - exact).norm() / exact.norm()
    assert error > 0.1


@given(seed=SEEDS, weights=WEIGHTS)
def test_heads_are_averaged_by_weight(seed: int, weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = [
        {"weight": torch.randn(2, 3, generator=generator), "bias": torch.randn(2, generator=generator)} for _ in weights
    ]
    found = average_tensors(heads, weights)
    for name in ("weight", "bias"):
        expected = sum(head[name].double() * weight for head, weight in zip(heads, weights, strict=True)) / sum(weights)
        torch.testing.assert_close(found[name], expected.float())


def test_heads_without_weight_or_of_different_names_are_refused() -> None:
    with pytest.raises(ValueError, match="positive weight"):
        average_tensors([{"weight": torch.ones(1)}], [0.0])
    with pytest.raises(ValueError, match="same tensors"):
        average_tensors([{"weight": torch.ones(1)}, {"bias": torch.ones(1)}], [1.0, 1.0])
