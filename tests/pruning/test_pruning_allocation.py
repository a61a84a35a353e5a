from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spinecli.checkpoints.counting import BlockCosts
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import OptionError
from spinecli.pruning.allocation import (
    Allocation,
    Budget,
    allocate,
    allocate_blocks,
    allocate_heads,
    allocate_share,
    block_candidates,
    head_candidates,
)

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def costs_of(shape: BlockShape, d_model: int, *, heads_leave: bool = True) -> BlockCosts:
    attention = 2 * d_model * (shape.heads + shape.kv_heads) * shape.head_dim
    channel = 3 * d_model
    return BlockCosts(
        block=attention + shape.channels * channel + 2 * d_model,
        kv_group=attention // shape.kv_heads if heads_leave else 0,
        channel=channel,
        dense=shape,
    )


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    kv_heads = draw(st.integers(1, 8))
    shape = BlockShape(
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8])),
        channels=draw(st.integers(16, 400)),
    )
    blocks = draw(st.integers(1, 32))
    heads_leave = draw(st.booleans())
    counts = draw(st.sets(st.integers(1, kv_heads))) | {kv_heads} if heads_leave else {kv_heads}
    return Budget(
        sparsity=draw(st.floats(0.01, 0.99)),
        blocks=blocks,
        removable_blocks=draw(st.integers(0, blocks)),
        costs=costs_of(shape, draw(st.sampled_from([32, 64])), heads_leave=heads_leave),
        kv_heads=tuple(sorted(counts, reverse=True)),
        round_to=draw(st.sampled_from([1, 8, 32, 64])),
    )


def check(budget: Budget, found: Allocation) -> None:
    """What every allocation promises."""
    costs, dense = budget.costs, budget.costs.dense
    assert 0 <= found.removed_blocks <= budget.removable_blocks
    assert found.removed_blocks < budget.blocks
    assert found.shape.kv_heads in budget.kv_heads
    assert found.shape.heads == found.shape.kv_heads * dense.group_size
    assert found.shape.head_dim == dense.head_dim
    assert found.shape.channels == dense.channels or found.shape.channels % budget.round_to == 0
    assert 1 <= found.shape.channels <= dense.channels
    kept = (budget.blocks - found.removed_blocks) * costs.parameters(found.shape)
    assert found.sparsity == pytest.approx(1 - kept / (budget.blocks * costs.block), abs=1e-12)


def one_unit(budget: Budget, found: Allocation) -> float:
    """The share of a channel step in every kept block."""
    channels = (budget.blocks - found.removed_blocks) * budget.round_to * budget.costs.channel
    return channels / (budget.blocks * budget.costs.block)


@given(budget=budgets(), share=st.floats(0, 1))
def test_share_allocations_meet_the_budget_within_a_unit(budget: Budget, share: float) -> None:
    try:
        found = allocate_share(budget, share)
    except OptionError as error:
        assert "--sparsity" in str(error)  # noqa: PT017
        return
    check(budget, found)
    assert abs(found.sparsity - budget.sparsity) <= one_unit(budget, found) + 1e-9
    assert found.removed_blocks <= round(share * budget.sparsity * budget.blocks)


@given(budget=budgets(), kv_heads=st.integers(1, 8), removed=st.integers(0, 32))
def test_a_refused_allocation_is_really_out_of_reach(budget: Budget, kv_heads: int, removed: int) -> None:
    dense = budget.costs.dense
    assume(kv_heads <= dense.kv_heads and removed < budget.blocks)
    found = allocate(budget, removed, kv_heads)
    if found is not None:
        assert abs(found.sparsity - budget.sparsity) <= one_unit(budget, found) + 1e-9
        return
    possible = {dense.channels, *range(budget.round_to, dense.channels, budget.round_to)}
    half = one_unit(budget, Allocation(removed, dense, 0.0)) / 2
    for channels in possible:
        shape = replace(dense, heads=kv_heads * dense.group_size, kv_heads=kv_heads, channels=channels)
        kept = (budget.blocks - removed) * budget.costs.parameters(shape)
        achieved = 1 - kept / (budget.blocks * budget.costs.block)
        assert abs(achieved - budget.sparsity) >= min(half, 0.5 * dense.channels / budget.round_to * half) - 1e-9


@given(budget=budgets())
def test_block_allocations_are_the_nearest_whole_number(budget: Budget) -> None:
    wanted = budget.sparsity * budget.blocks
    try:
        found = allocate_blocks(budget)
    except OptionError as error:
        assert "--protect" in str(error)  # noqa: PT017
        assert round(wanted) > min(budget.removable_blocks, budget.blocks - 1)
        return
    check(budget, found)
    assert abs(found.removed_blocks - wanted) <= 0.5
    assert found.shape == budget.costs.dense


@given(budget=budgets())
def test_candidates_are_distinct_and_all_keep_the_promises(budget: Budget) -> None:
    try:
        by_blocks = block_candidates(budget, SHARES)
    except OptionError as error:
        assert "cannot be met" in str(error)  # noqa: PT017
        return
    removed = [allocation.removed_blocks for allocation in by_blocks]
    assert removed == sorted(set(removed))
    assert removed
    for start in by_blocks:
        check(budget, start)
        by_heads = head_candidates(budget, start, (0.5, 1.0, 1.5))
        assert len({start, *by_heads}) == 1 + len(by_heads)
        for allocation in by_heads:
            check(budget, allocation)
            assert allocation.removed_blocks == start.removed_blocks
            assert abs(allocation.sparsity - budget.sparsity) <= one_unit(budget, allocation) + 1e-9


def budget_of(**changes: object) -> Budget:
    shape = BlockShape(8, 8, 8, 96)
    values = {
        "sparsity": 0.3,
        "blocks": 8,
        "removable_blocks": 6,
        "costs": costs_of(shape, 64),
        "kv_heads": tuple(range(8, 0, -1)),
        "round_to": 1,
    }
    return Budget(**{**values, **changes})  # type: ignore[arg-type]


def test_head_factor_says_how_much_harder_heads_are_cut() -> None:
    found = [allocate_heads(budget_of(sparsity=0.25), 0, factor) for factor in (0.0, 1.0, 1.5)]
    none, same, more = (allocation.shape for allocation in found if allocation)
    assert (none.kv_heads, same.kv_heads, more.kv_heads) == (8, 6, 5)
    assert none.channels < same.channels < more.channels
    assert same.channels == pytest.approx(0.75 * 96, abs=1)


def test_protected_blocks_bound_what_leaves() -> None:
    assert allocate_share(budget_of(sparsity=0.5), 1.0).removed_blocks == 4
    assert allocate_share(budget_of(sparsity=0.5, removable_blocks=2), 1.0).removed_blocks == 2


def test_too_much_by_blocks_alone() -> None:
    with pytest.raises(OptionError, match=r"would remove 7 of 8 blocks, and only 6 may be removed.*--protect"):
        allocate_blocks(budget_of(sparsity=0.9))


@pytest.mark.parametrize(
    "method",
    [allocate_blocks, lambda budget: allocate_share(budget, 1.0), lambda budget: block_candidates(budget, SHARES)[-1]],
    ids=["blocks", "share", "candidates"],
)
def test_a_model_never_loses_all_its_blocks(method: object) -> None:
    budget = budget_of(sparsity=0.97, blocks=4, removable_blocks=4)
    try:
        assert method(budget).removed_blocks < 4  # type: ignore[operator]
    except OptionError as error:
        assert "--sparsity" in str(error)  # noqa: PT017


def test_impossible_budgets_are_told_in_a_sentence() -> None:
    heads_stay = budget_of(sparsity=0.9, kv_heads=(8,), costs=costs_of(BlockShape(8, 8, 8, 96), 64, heads_leave=False))
    with pytest.raises(OptionError, match=r"Sparsity 0\.9 cannot be met.*--block-share"):
        allocate_share(heads_stay, 0.0)


def test_ways_out_of_an_impossible_budget_are_possible() -> None:
    """At the greatest share of blocks nobody is told to raise it, and whatever is named helps."""
    heads_stay = costs_of(BlockShape(8, 8, 8, 96), 64, heads_leave=False)
    budget = budget_of(sparsity=0.9, kv_heads=(8,), costs=heads_stay, removable_blocks=2)
    with pytest.raises(OptionError, match=r"lower --sparsity, or name fewer --protect") as caught:
        allocate_share(budget, 1.0)
    assert "--block-share" not in str(caught.value)
    assert allocate_share(replace(budget, removable_blocks=8), 1.0).removed_blocks == 7
    with pytest.raises(OptionError, match=r"cannot be met with 0 of 8 blocks removed; lower --sparsity\.$"):
        allocate_share(budget, 0.0, blocks_leave=False)
    coarse = budget_of(sparsity=0.4, kv_heads=(8,), round_to=256)
    with pytest.raises(OptionError, match="or lower --round-to"):
        allocate_share(coarse, 0.0)
    assert allocate_share(replace(coarse, round_to=1), 0.0).removed_blocks == 0


def test_a_step_wider_than_the_layer_cannot_meet_a_budget() -> None:
    with pytest.raises(OptionError, match="cannot be met"):
        allocate_share(budget_of(sparsity=0.4, kv_heads=(8,), round_to=256), 0.0)
