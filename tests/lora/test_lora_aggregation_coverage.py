"""Aggregation over masks against dense references that average entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from aggregation_cases import NAME, SEEDS, SHAPE, assert_same_product, random_factors, random_units
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.lora.aggregation.averaging import average_factors
from spinecli.lora.aggregation.contribution import Contribution, embedded, full_shape, resized, restricted
from spinecli.lora.aggregation.coverage import COVERAGE_FLOOR, average_covered, covered_stack, heterogeneity_weight
from spinecli.lora.factors import Adapter, Factors

AXES = st.sampled_from(["rows", "columns"])
DEVICES = st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 5)), min_size=1, max_size=4)
FLOORS = st.sampled_from([0.0, COVERAGE_FLOOR, 0.5])


def pruned(seed: int, devices: Sequence[tuple[float, int]], axis: str, share: float = 0.6) -> list[Contribution]:
    """Contributions of (weight, rank), each with its own surviving rows or columns."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for weight, rank in devices:
        kept = random_units(generator, SHAPE[0] if axis == "rows" else SHAPE[1], share)
        full = random_factors(generator, rank)
        factors = restricted(full, **{axis: kept})
        made.append(Contribution({NAME: factors}, weight, **{axis: {NAME: kept}}))
    return made


def before(seed: int, rank: int = 4) -> Adapter:
    return {NAME: random_factors(torch.Generator().manual_seed(seed + 77), rank)}


def mask_of(contribution: Contribution) -> Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.float64)
    if NAME in contribution.rows:
        mask[contribution.rows[NAME]] = 1
    elif NAME in contribution.columns:
        mask[:, contribution.columns[NAME]] = 1
    else:
        mask[:] = 1
    return mask


def dense_mean(
    terms: Sequence[tuple[float, Tensor, Tensor]], previous: Tensor, floor: float, everything: float
) -> Tensor:
    """Entry by entry over (weight, mask, dense product)."""
    mean = torch.zeros(SHAPE, dtype=torch.float64)
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            covering = [(w / everything, product[row, column]) for w, mask, product in terms if mask[row, column]]
            coverage = sum(weight for weight, _ in covering)
            if coverage == 0:
                mean[row, column] = previous[row, column]
                continue
            divisor = max(coverage, floor)
            new = sum(weight * value for weight, value in covering) / divisor
            mean[row, column] = new + (1 - coverage / divisor) * previous[row, column]
    return mean


def dense(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


@given(seed=SEEDS, devices=DEVICES, axis=AXES, floor=FLOORS)
def test_coverage_equals_the_dense_reference(
    seed: int, devices: list[tuple[float, int]], axis: str, floor: float
) -> None:
    contributions, previous = pruned(seed, devices, axis), before(seed)
    terms = [(holder.weight, mask_of(holder), dense(holder.embedded(NAME, SHAPE))) for holder in contributions]
    expected = dense_mean(terms, dense(previous[NAME]), floor, sum(weight for weight, _ in devices))
    assert_same_product(covered_stack(NAME, contributions, previous, floor=floor), expected)
    assert_same_product(average_covered(contributions, previous, max(SHAPE), floor=floor)[NAME], expected)


@given(seed=SEEDS, devices=DEVICES, axis=AXES, floor=FLOORS)
def test_coverage_by_component_equals_the_dense_reference_of_each_component(
    seed: int, devices: list[tuple[float, int]], axis: str, floor: float
) -> None:
    contributions, previous = pruned(seed, devices, axis), before(seed)
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for component in range(max([4, *(rank for _, rank in devices)])):
        terms = []
        for holder in contributions:
            full = holder.embedded(NAME, SHAPE)
            if full.rank > component:
                product = dense(Factors(full.a[[component]], full.b[:, [component]]))
                terms.append((holder.weight, mask_of(holder), product))
        old = resized(previous[NAME], 8)
        old_product = dense(Factors(old.a[[component]], old.b[:, [component]]))
        expected += dense_mean(terms, old_product, floor, sum(weight for weight, _ in devices))
    found = covered_stack(NAME, contributions, previous, floor=floor, by_component=True)
    assert_same_product(found, expected)


@given(seed=SEEDS, devices=DEVICES, axis=AXES)
def test_uncovered_entries_are_unchanged(seed: int, devices: list[tuple[float, int]], axis: str) -> None:
    contributions, previous = pruned(seed, devices, axis, share=0.3), before(seed)
    nobody = sum(mask_of(holder) for holder in contributions) == 0
    found = dense(average_covered(contributions, previous, max(SHAPE))[NAME])
    torch.testing.assert_close(found[nobody], dense(previous[NAME])[nobody], atol=1e-5, rtol=0)


def test_uncovered_entries_do_occur_in_these_cases() -> None:
    contributions = pruned(0, [(1.0, 2), (1.0, 3)], "rows", share=0.3)
    assert (sum(mask_of(holder) for holder in contributions) == 0).any()


@given(seed=SEEDS, devices=DEVICES, axis=AXES)
def test_equal_masks_give_the_weighted_mean_of_the_products_on_them(
    seed: int, devices: list[tuple[float, int]], axis: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = random_units(generator, SHAPE[0] if axis == "rows" else SHAPE[1], 0.6)
    contributions = [
        Contribution({NAME: restricted(random_factors(generator, 3), **{axis: kept})}, weight, **{axis: {NAME: kept}})
        for weight, _ in devices
    ]
    total = sum(weight for weight, _ in devices)
    expected = sum(dense(holder.embedded(NAME, SHAPE)) * holder.weight / total for holder in contributions)
    mask = mask_of(contributions[0]).bool()
    found = dense(average_covered(contributions, before(seed), max(SHAPE))[NAME])
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_an_entry_one_light_device_covers_is_filled_up_with_its_previous_value() -> None:
    heavy, light = torch.arange(1, SHAPE[0]), torch.arange(SHAPE[0])
    ones = Factors(torch.ones(1, SHAPE[1]), torch.ones(SHAPE[0], 1))
    contributions = [
        Contribution({NAME: restricted(ones, rows=heavy)}, 0.96, rows={NAME: heavy}),
        Contribution({NAME: ones}, 0.04, rows={NAME: light}),
    ]
    previous = {NAME: Factors(ones.a, ones.b * 3)}
    found = covered_stack(NAME, contributions, previous, floor=0.1).product()
    torch.testing.assert_close(found[1:], torch.ones(SHAPE[0] - 1, SHAPE[1]))
    torch.testing.assert_close(found[0], torch.full((SHAPE[1],), 0.4 * 1 + 0.6 * 3))


def test_by_component_a_high_rank_part_is_not_diluted() -> None:
    part = Factors(torch.eye(2, SHAPE[1]), torch.eye(SHAPE[0], 2))
    contributions = [Contribution({NAME: part.truncated(1)}, 3.0), Contribution({NAME: part}, 1.0)]
    diluted = covered_stack(NAME, contributions, {}).product()
    whole = covered_stack(NAME, contributions, {}, by_component=True).product()
    assert float(diluted[1, 1]) == pytest.approx(0.25)
    assert float(whole[1, 1]) == pytest.approx(1.0)
    assert float(diluted[0, 0]) == float(whole[0, 0]) == pytest.approx(1.0)


def test_by_component_what_no_device_was_sent_is_kept() -> None:
    part = Factors(torch.eye(2, SHAPE[1]), torch.eye(SHAPE[0], 2))
    previous, sent = {NAME: part}, Contribution({NAME: Factors(part.a[:1], part.b[:, :1] * 5)}, 1.0)
    kept = covered_stack(NAME, [sent], previous, by_component=True).product()
    forgotten = covered_stack(NAME, [sent], previous).product()
    assert kept.diagonal().tolist()[:2] == [5.0, 1.0]
    assert forgotten.diagonal().tolist()[:2] == [5.0, 0.0]


@given(seed=SEEDS, devices=DEVICES, axis=AXES)
def test_averaging_of_factors_leaves_out_the_devices_that_lost_a_row_or_column(
    seed: int, devices: list[tuple[float, int]], axis: str
) -> None:
    contributions, previous = pruned(seed, [(weight, 4) for weight, _ in devices], axis, 0.4), before(seed)
    found, pruned_side = average_factors(contributions, previous)[NAME], "b" if axis == "rows" else "a"
    for unit in range(SHAPE[0] if axis == "rows" else SHAPE[1]):

        def slice_of(factors: Factors, unit: int = unit) -> Tensor:
            return factors.b[unit] if axis == "rows" else factors.a[:, unit]

        covering = [
            (holder.weight, slice_of(holder.embedded(NAME, SHAPE)))
            for holder in contributions
            if unit in getattr(holder, axis)[NAME]
        ]
        total = sum(weight for weight, _ in covering)
        expected = sum(weight / total * value for weight, value in covering) if covering else slice_of(previous[NAME])
        torch.testing.assert_close(slice_of(found), expected, atol=1e-5, rtol=1e-5)
    assert getattr(found, pruned_side).shape == getattr(previous[NAME], pruned_side).shape


def test_a_projection_pruned_by_rows_here_and_columns_there_is_refused() -> None:
    contributions = pruned(0, [(1.0, 2)], "rows") + pruned(1, [(1.0, 2)], "columns")
    with pytest.raises(ValueError, match="and others columns"):
        covered_stack(NAME, contributions, before(0))


@given(seed=SEEDS, axis=AXES)
def test_restricting_undoes_embedding(seed: int, axis: str) -> None:
    [holder] = pruned(seed, [(1.0, 3)], axis)
    kept = getattr(holder, axis)[NAME]
    full = holder.embedded(NAME, SHAPE)
    again = restricted(full, **{axis: kept})
    assert torch.equal(again.a, holder.adapter[NAME].a)
    assert torch.equal(again.b, holder.adapter[NAME].b)
    assert torch.equal(full.product() * (1 - mask_of(holder)), torch.zeros(SHAPE))


def test_contributions_that_contradict_themselves_are_refused() -> None:
    factors = Factors(torch.zeros(2, 7), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="5 kept rows, and B has 4"):
        Contribution({NAME: factors}, 1.0, rows={NAME: torch.arange(5)})
    with pytest.raises(ValueError, match="6 kept columns, and A has 7"):
        Contribution({NAME: factors}, 1.0, columns={NAME: torch.arange(6)})
    with pytest.raises(ValueError, match="not both"):
        Contribution({NAME: factors}, 1.0, rows={NAME: torch.arange(4)}, columns={NAME: torch.arange(7)})
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not negative"):
            Contribution({NAME: factors}, weight)
    with pytest.raises(ValueError, match="do not fit"):
        embedded(factors, (9, 7))
    with pytest.raises(ValueError, match="full shape"):
        full_shape(NAME, [Contribution({NAME: factors}, 1.0, rows={NAME: torch.arange(4)})], {})


def test_weights_fall_with_the_ratio_and_rise_with_rank_and_data() -> None:
    assert heterogeneity_weight(100, 8, 32, 0.75) == pytest.approx(100 * 0.5 * 0.5)
    assert heterogeneity_weight(100, 32, 32, 0.0) == 100
