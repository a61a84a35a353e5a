from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinecli.lora.planning.ranks import lowered, rank_distribution, rank_sums, ranks_by_device

LAYOUTS = st.tuples(st.integers(1, 48), st.integers(1, 40), st.integers(0, 3), st.integers(0, 200))


@given(LAYOUTS)
def test_ranks_spend_the_budget_and_rise_toward_the_output(layout: tuple[int, int, int, int]) -> None:
    blocks, minimum, step, more = layout
    budget = blocks * minimum + more
    ranks = rank_distribution(blocks, budget, step, minimum)
    assert int(ranks.sum()) == budget
    assert int(ranks.min()) >= minimum
    rises = ranks.diff()
    assert bool((rises >= 0).all())
    assert bool((rises <= step + 1).all())


@pytest.mark.parametrize(("depth", "budget"), [(12, 270), (9, 216), (6, 153)])
def test_a_published_distribution_is_reproduced(depth: int, budget: int) -> None:
    ranks = rank_distribution(12, 270)
    assert ranks.tolist() == list(range(17, 29))
    assert int(rank_sums(ranks)[depth - 1]) == budget


def test_where_the_progression_would_fall_below_the_minimum_it_starts_later() -> None:
    assert rank_distribution(8, 14).tolist() == [1, 1, 1, 1, 1, 2, 3, 4]
    assert rank_distribution(4, 4).tolist() == [1, 1, 1, 1]


def test_equal_ranks_are_a_distribution_of_step_zero() -> None:
    assert rank_distribution(6, 48, step=0).tolist() == [8] * 6


def test_what_no_distribution_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match="less than rank 1"):
        rank_distribution(4, 3)
    with pytest.raises(ValueError, match="does not fall"):
        rank_distribution(4, 8, step=-1)


def test_lowering_ends_at_the_minimum() -> None:
    ranks = rank_distribution(5, 20)
    seen = [ranks]
    while not torch.equal(lowered(seen[-1]), seen[-1]):
        seen.append(lowered(seen[-1]))
    assert len(seen) == int(ranks.max())
    assert seen[-1].tolist() == [1] * 5


@given(LAYOUTS, st.data())
def test_a_block_has_the_same_rank_on_every_device_that_holds_it(
    layout: tuple[int, int, int, int], data: st.DataObject
) -> None:
    blocks, minimum, step, more = layout
    ranks = rank_distribution(blocks, blocks * minimum + more, step, minimum)
    depths = torch.tensor(data.draw(st.lists(st.integers(0, blocks), min_size=1, max_size=8)))
    table = ranks_by_device(ranks, depths)
    for row, depth in zip(table, depths.tolist(), strict=True):
        assert row[: blocks - depth].eq(0).all()
        assert torch.equal(row[blocks - depth :], ranks[blocks - depth :])
        assert int(row.sum()) == (int(rank_sums(ranks)[depth - 1]) if depth else 0)
