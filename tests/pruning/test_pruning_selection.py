from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.pruning.allocation import (
    Allocation,
    last_of_their_kind,
    protected_blocks,
    select_shapes,
    shapes_after,
)
from spinecli.pruning.method import UnitScores
from spinecli.pruning.scoring import Scores

SHAPE = BlockShape(heads=6, kv_heads=3, head_dim=4, channels=10)
BLOCKS = 5
NONE = frozenset[int]()


def scored(influence: torch.Tensor, kv_groups: torch.Tensor, channels: torch.Tensor) -> Scores:
    return Scores(influence, tuple(UnitScores(*each) for each in zip(kv_groups, channels, strict=True)))


def scores_of(seed: int, *, ties: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        values = torch.rand(*size, generator=generator, dtype=torch.float64)
        return (values * 3).floor() if ties else values

    return scored(draw(BLOCKS), draw(BLOCKS, SHAPE.kv_heads), draw(BLOCKS, SHAPE.channels))


def allocation(removed: int = 1, kv_heads: int = 2, channels: int = 6) -> Allocation:
    return Allocation(removed, BlockShape(kv_heads * 2, kv_heads, 4, channels), 0.0)


def select(scores: Scores, wanted: Allocation, shape: BlockShape, protected: frozenset[int]) -> Masks:
    after = shapes_after(scores, wanted, protected)
    return select_shapes(scores, after, [shape] * len(after))


def test_the_most_important_units_stay() -> None:
    scores = scored(
        torch.tensor([0.5, 0.1, 0.9]).double(),
        torch.tensor([[3.0, 1, 2]] * 3).double(),
        torch.arange(10).double().repeat(3, 1),
    )
    masks = select(scores, allocation(kv_heads=2, channels=3), SHAPE, NONE)
    assert masks.removed_blocks == [1]
    assert masks.blocks[0].heads.tolist() == [True, True, False, False, True, True]
    assert masks.blocks[2].channels.nonzero().flatten().tolist() == [7, 8, 9]


@given(seed=st.integers(0, 999), removed=st.integers(0, 2), kv_heads=st.integers(1, 3), channels=st.integers(1, 10))
def test_every_kept_block_has_the_allocated_shape(seed: int, removed: int, kv_heads: int, channels: int) -> None:
    wanted = allocation(removed, kv_heads, channels)
    masks = select(scores_of(seed, ties=True), wanted, SHAPE, frozenset({0, 4}))
    assert masks.uniform_shape(SHAPE) == wanted.shape
    assert len(masks.removed_blocks) == removed
    assert not {0, 4} & set(masks.removed_blocks)


@given(seed=st.integers(0, 999), data=st.data())
def test_renumbering_units_renumbers_the_masks(seed: int, data: st.DataObject) -> None:
    scores = scores_of(seed)
    groups = torch.tensor(data.draw(st.permutations(range(SHAPE.kv_heads))))
    channels = torch.tensor(data.draw(st.permutations(range(SHAPE.channels))))
    blocks = torch.tensor(data.draw(st.permutations(range(BLOCKS))))
    renumbered = Scores(
        scores.influence[blocks],
        tuple(
            UnitScores(scores.units[block].kv_groups[groups], scores.units[block].channels[channels])
            for block in blocks.tolist()
        ),
    )
    before = select(scores, allocation(), SHAPE, NONE)
    after = select(renumbered, allocation(), SHAPE, NONE)
    for place, old in enumerate(blocks.tolist()):
        heads = before.blocks[old].heads.view(SHAPE.kv_heads, SHAPE.group_size)
        assert torch.equal(after.blocks[place].heads.view(SHAPE.kv_heads, SHAPE.group_size), heads[groups])
        assert torch.equal(after.blocks[place].channels, before.blocks[old].channels[channels])


def test_ties_go_to_the_lower_index() -> None:
    equal = scored(torch.ones(BLOCKS), torch.ones(BLOCKS, 3), torch.ones(BLOCKS, 10))
    masks = select(equal, allocation(removed=2, kv_heads=1, channels=4), SHAPE, NONE)
    assert masks.removed_blocks == [0, 1]
    assert masks.blocks[2].heads.tolist() == [True, True, False, False, False, False]
    assert masks.blocks[2].channels.tolist() == [True] * 4 + [False] * 6


def test_ties_among_many_go_to_the_lower_index() -> None:
    wide = BlockShape(heads=2, kv_heads=2, head_dim=4, channels=1000)
    equal = scored(torch.ones(200), torch.ones(200, 2), torch.ones(200, 1000))
    masks = select(equal, Allocation(50, BlockShape(1, 1, 4, 300), 0.0), wide, NONE)
    assert masks.removed_blocks == list(range(50))
    assert masks.blocks[60].channels.nonzero().flatten().tolist() == list(range(300))


def test_protected_blocks_stay_whatever_their_influence() -> None:
    scores = scores_of(0)
    scores.influence[:] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    assert select(scores, allocation(removed=2), SHAPE, frozenset({0, 2})).removed_blocks == [1, 3]
    with pytest.raises(ValueError, match="unprotected"):
        select(scores, allocation(removed=2), SHAPE, frozenset({0, 1, 2, 3}))


@given(seed=st.integers(0, 999), data=st.data())
def test_blocks_keep_as_much_as_their_own_shapes_say(seed: int, data: st.DataObject) -> None:
    widths = st.tuples(st.integers(0, SHAPE.kv_heads), st.integers(0, SHAPE.channels))
    wanted = [
        BlockShape(groups * SHAPE.group_size, groups, SHAPE.head_dim, channels)
        for groups, channels in data.draw(st.lists(widths, min_size=BLOCKS, max_size=BLOCKS))
    ]
    scores = scores_of(seed)
    masks = select_shapes(scores, wanted, [SHAPE] * BLOCKS)
    assert masks.removed_blocks == [index for index, each in enumerate(wanted) if not each.heads + each.channels]
    for units, mask, each in zip(scores.units, masks.blocks, wanted, strict=True):
        assert (int(mask.heads.sum()), int(mask.channels.sum())) == (each.heads, each.channels)
        gone, stay = units.channels[~mask.channels], units.channels[mask.channels]
        assert not len(gone) or not len(stay) or gone.max() < stay.min()


def test_default_protection() -> None:
    assert protected_blocks(32) == {0, 1, 2, 3, 30, 31}
    for blocks in range(2, 81):
        assert {0, blocks - 1} <= protected_blocks(blocks) <= set(range(blocks))


def test_the_published_order_of_llama_2_7b_is_reproduced() -> None:
    """Block influences in ShortGPT's order: blocks 21 to 29 leave, and never 0, 1 or 31, even if scored lowest."""
    order = [27, 26, 25, 28, 24, 29, 23, 21, 22]
    influence = torch.ones(32, dtype=torch.float64)
    influence[order] = torch.linspace(0.1, 0.2, 9).double()
    influence[[0, 1, 31]] = 0.0
    scores = scored(influence, torch.ones(32, 3), torch.ones(32, 10))
    masks = select(scores, allocation(removed=9), SHAPE, protected_blocks(32))
    assert masks.removed_blocks == sorted(order)


def test_scores_come_back_from_tensors() -> None:
    scores = scores_of(1)
    again = Scores.from_tensors(scores.tensors())
    assert all(torch.equal(again.tensors()[name], value) for name, value in scores.tensors().items())


def test_the_most_influential_block_of_every_unprotected_kind_of_attention_stays() -> None:
    kinds = ("window", "window", "global", "global", "none")
    influence = torch.tensor([0.5, 0.9, 0.2, 0.3, 0.1])
    assert last_of_their_kind(influence, kinds, NONE) == {1: "window", 3: "global", 4: "none"}
    assert last_of_their_kind(influence, kinds, frozenset({0, 2})) == {4: "none"}
    assert last_of_their_kind(influence, ("window",) * 5, frozenset({4})) == {}
