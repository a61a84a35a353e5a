"""The elimination order against brute force: refit the remaining columns for every possible removal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spinecli.pruning.elimination import RIDGE, eliminate


def layer(seed: int, units: int, unit_size: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = units * unit_size
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(5, width, generator=generator, dtype=torch.float64), inputs.T @ inputs


def damped(gram: Tensor) -> Tensor:
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def error_without(weight: Tensor, gram: Tensor, removed: list[int], unit_size: int) -> float:
    """min over W' that leave `removed` out of tr((W - W') G (W - W')ᵀ)."""
    gone = torch.zeros(weight.shape[1], dtype=torch.bool)
    for unit in removed:
        gone[unit * unit_size : (unit + 1) * unit_size] = True
    best = torch.zeros_like(weight)
    best[:, ~gone] = torch.linalg.solve(gram[~gone][:, ~gone], (weight @ gram)[:, ~gone].T).T
    difference = weight - best
    return float((difference @ gram * difference).sum())


@pytest.mark.parametrize("unit_size", [1, 3])
@settings(max_examples=25)
@given(seed=st.integers(0, 9999))
def test_each_removal_is_the_cheapest_one_left(unit_size: int, seed: int) -> None:
    units = 6
    weight, gram = layer(seed, units, unit_size)
    order = eliminate(weight, gram.clone(), unit_size, step=1).order.argsort().tolist()
    removed: list[int] = []
    for unit in order[:-1]:
        costs = {
            other: error_without(weight, damped(gram), [*removed, other], unit_size)
            for other in range(units)
            if other not in removed
        }
        assert costs[unit] == pytest.approx(min(costs.values()), rel=1e-6)
        removed.append(unit)


@pytest.mark.parametrize("unit_size", [1, 2])
@given(seed=st.integers(0, 999), data=st.data())
def test_renumbering_units_renumbers_the_order(unit_size: int, seed: int, data: st.DataObject) -> None:
    weight, gram = layer(seed, 5, unit_size)
    units = torch.tensor(data.draw(st.permutations(range(5))))
    columns = (units[:, None] * unit_size + torch.arange(unit_size)).flatten()
    before = eliminate(weight, gram.clone(), unit_size).order
    after = eliminate(weight[:, columns], gram[columns][:, columns].clone(), unit_size).order
    assert torch.equal(after, before[units])


@given(seed=st.integers(0, 999), units=st.integers(1, 9), step=st.integers(1, 12))
def test_every_unit_gets_a_place_of_its_own(seed: int, units: int, step: int) -> None:
    weight, gram = layer(seed, units, 2)
    assert sorted(eliminate(weight, gram, 2, step=step).order.tolist()) == list(range(units))


def test_steps_take_the_cheapest_together() -> None:
    weight, gram = layer(0, 9, 1)
    alone, together = (eliminate(weight, gram.clone(), 1, step=step).order for step in (1, 9))
    costs = torch.tensor([error_without(weight, damped(gram), [unit], 1) for unit in range(9)])
    assert together.argsort().tolist() == costs.argsort().tolist()
    assert together.argmin() == alone.argmin()


def test_a_copied_input_is_the_first_to_leave() -> None:
    """What the others can say as well costs nothing, however strong it is; a plain norm would keep both."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    inputs[:, 3] = inputs[:, 1]
    weight = torch.ones(4, 5, dtype=torch.float64)
    weight[:, [1, 3]] *= 5
    order = eliminate(weight, inputs.T @ inputs, 1).order
    assert order.argmin().item() in (1, 3)


def test_the_twin_of_what_left_takes_over_its_work() -> None:
    """Either of two copies can leave for nothing; the other then does the work of both, and is the last to leave."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    inputs[:, 3] = inputs[:, 1]
    weight = torch.ones(4, 5, dtype=torch.float64)
    weight[:, [1, 3]] *= 5
    gram = inputs.T @ inputs
    found = eliminate(weight, gram.clone(), 1, step=1)
    first, last = (int(place) for place in (found.order.argmin(), found.order.argmax()))
    assert {first, last} == {1, 3}
    assert found.errors[1] < 0.02 * error_without(weight, damped(gram), [1, 3], 1)
    together = eliminate(weight, gram, 1, step=2)
    assert {int(unit) for unit in together.order.argsort()[:2]} == {1, 3}, "a step does not see what its units share"


@given(seed=st.integers(0, 999), unit_size=st.integers(1, 3), stay=st.integers(0, 9), step=st.integers(1, 4))
def test_units_that_stay_end_the_same_elimination_early(seed: int, unit_size: int, stay: int, step: int) -> None:
    units = 9
    weight, gram = layer(seed, units, unit_size)
    whole = eliminate(weight, gram.clone(), unit_size, step=step)
    found = eliminate(weight, gram.clone(), unit_size, stay=stay, step=step)
    leaving = units - stay
    assert sorted(found.order.tolist()) == list(range(units))
    assert found.order.argsort()[:leaving].tolist() == whole.order.argsort()[:leaving].tolist()
    torch.testing.assert_close(found.errors, whole.errors[: leaving + 1])


@given(seed=st.integers(0, 999), stay=st.integers(1, 5))
def test_units_that_stay_are_ordered_by_what_their_loss_would_cost(seed: int, stay: int) -> None:
    weight, gram = layer(seed, 6, 2)
    order = eliminate(weight, gram.clone(), 2, stay=stay).order.argsort().tolist()
    gone, lasting = order[: 6 - stay], order[6 - stay :]
    costs = [error_without(weight, damped(gram), [*gone, unit], 2) for unit in lasting]
    assert costs == sorted(costs)


def test_by_default_single_inputs_leave_several_at_a_time() -> None:
    weight, gram = layer(1, 20, 1)
    assert torch.equal(eliminate(weight, gram.clone(), 1).order, eliminate(weight, gram.clone(), 1, step=8).order)
    assert not torch.equal(eliminate(weight, gram.clone(), 1).order, eliminate(weight, gram.clone(), 1, step=1).order)
    weight, gram = layer(1, 10, 2)
    assert torch.equal(eliminate(weight, gram.clone(), 2).order, eliminate(weight, gram.clone(), 2, step=1).order)


def test_the_weight_is_not_changed() -> None:
    weight, gram = layer(2, 6, 2)
    before = weight.clone()
    eliminate(weight, gram, 2, stay=2)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    weight, gram = layer(0, 6, 1, tokens=tokens)
    assert sorted(eliminate(weight, gram, 1).order.tolist()) == list(range(6))
