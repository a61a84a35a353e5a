from __future__ import annotations

import math

import pytest
import torch
from control_cases import candidates
from hypothesis import given
from hypothesis import strategies as st

from spinecli.federation.split.control.batches import priorities
from spinecli.federation.split.control.estimates import (
    divergence,
    label_distributions,
    merged_distribution,
    reference_distribution,
)
from spinecli.federation.split.control.selection.candidates import Candidates


@given(candidates(), st.data())
def test_divergence_is_not_negative_and_zero_only_between_equals(found: Candidates, data: st.DataObject) -> None:
    one = data.draw(st.integers(0, found.devices - 1))
    values = divergence(found.distributions, found.reference)
    assert bool((values >= 0).all())
    assert float(divergence(found.reference, found.reference)) == 0.0
    # Pinsker: the total variation is at most sqrt(KL / 2)
    variation = (found.distributions - found.reference).abs().sum(dim=1) / 2
    assert bool((variation <= (values / 2).sqrt() + 1e-9).all())
    p, q = found.distributions[one].tolist(), found.reference.tolist()
    by_hand = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)
    assert float(values[one]) == pytest.approx(by_hand, abs=1e-12)


@given(candidates(), st.data())
def test_many_cohorts_at_once_are_what_each_is_alone_whatever_the_order_of_devices(
    found: Candidates, data: st.DataObject
) -> None:
    rows = st.lists(st.booleans(), min_size=found.devices, max_size=found.devices).filter(any)
    cohorts = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    order = torch.tensor(data.draw(st.permutations(range(found.devices))))
    together = found.divergences(cohorts)
    merged = merged_distribution(cohorts * found.batches, found.distributions)
    assert torch.allclose(together, divergence(merged, found.reference), rtol=0, atol=1e-12)
    for cohort, value in zip(cohorts, together, strict=True):
        alone = merged_distribution((cohort * found.batches)[order], found.distributions[order])
        assert float(divergence(alone, found.reference)) == pytest.approx(float(value), abs=1e-12)


def test_merging_weighs_by_rows_and_the_reference_does_not_weigh() -> None:
    distributions = label_distributions(torch.tensor([[30, 0], [1, 1]]))
    assert merged_distribution(torch.tensor([1, 3]), distributions).tolist() == [0.625, 0.375]
    assert reference_distribution(distributions).tolist() == [0.75, 0.25]


def test_a_label_that_the_reference_lacks_is_infinitely_far() -> None:
    reference = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert float(divergence(torch.tensor([0.5, 0.5], dtype=torch.float64), reference)) == math.inf


@pytest.mark.parametrize("counts", [[[1, 2], [0, 0]], [[1, -1], [1, 1]]])
def test_counts_without_examples_have_no_distribution(counts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        label_distributions(torch.tensor(counts))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_priority_is_the_formula_and_falls_with_participation(taken: list[int]) -> None:
    found = priorities(torch.tensor(taken)).tolist()
    total = sum(count + 1 for count in taken)
    assert found == pytest.approx([total / (count + 1) for count in taken])
    for (one, high), (other, low) in zip(
        zip(taken, found, strict=True), zip(taken[1:], found[1:], strict=True), strict=False
    ):
        assert (one < other) == (high > low)


def test_nobody_completed_fewer_than_no_rounds() -> None:
    with pytest.raises(ValueError, match="fewer than 0"):
        priorities(torch.tensor([1, -1]))
