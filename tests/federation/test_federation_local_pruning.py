from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import VARIANTS, Recipe, classifier, recipe
from hypothesis import assume, given
from hypothesis import strategies as st
from test_federation_training import Bench

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import BlockCosts
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.federation.client.local_pruning import Importance, PrunableUnits, UnitCounts, narrowed, ramp

Opened = Callable[[Recipe], Checkpoint]
RATIOS = st.floats(0, 0.95)


@st.composite
def any_cuts(draw: st.DrawFn) -> PrunableUnits:
    """Blocks of all proportions; heads that leave one by one, in some counts only, or not at all."""
    kv_heads, group_size = draw(st.integers(1, 16)), draw(st.integers(1, 4))
    channels = draw(st.integers(20, 400))
    channel, group, rest = draw(st.integers(1, 2000)), draw(st.integers(1, 200_000)), draw(st.integers(0, 500))
    counts = list(range(kv_heads, 0, -1))
    kept = draw(st.sampled_from(["all", "none", "some"]))
    if kept == "none":
        group, counts = 0, [kv_heads]
    elif kept == "some":
        counts = [kv_heads, *(count for count in counts[1:] if draw(st.booleans()))]
    block = kv_heads * group + channels * channel + rest + (0 if group else 1000)
    return PrunableUnits(
        BlockCosts(block, group, channel, BlockShape(kv_heads * group_size, kv_heads, 8, channels)), tuple(counts)
    )


def reachable(cuts: PrunableUnits) -> list[float]:
    """Every ratio that whole units can make, with a group and 5 % of the channels left."""
    least = max(1, round(0.05 * cuts.dense.channels))
    return [
        cuts.ratio_of(UnitCounts(groups, channels))
        for groups in cuts.kv_counts
        for channels in range(least, cuts.dense.channels + 1)
    ]


@given(any_cuts(), RATIOS)
def test_widths_meet_the_ratio_as_nearly_as_whole_units_can(cuts: PrunableUnits, ratio: float) -> None:
    widths = cuts.widths_at(ratio)
    assert widths.kv_heads in cuts.kv_counts
    assert max(1, round(0.05 * cuts.dense.channels)) <= widths.channels <= cuts.dense.channels
    half = 0.5 * cuts.costs.channel / cuts.costs.block
    nearest = min(abs(found - ratio) for found in reachable(cuts))
    assert abs(cuts.ratio_of(widths) - ratio) <= nearest + half + 1e-9


@given(any_cuts(), RATIOS, RATIOS)
def test_a_higher_ratio_keeps_no_more_to_within_a_channel(cuts: PrunableUnits, one: float, other: float) -> None:
    low, high = sorted((one, other))
    lower, higher = cuts.widths_at(low), cuts.widths_at(high)
    unit = max(cuts.costs.channel, cuts.costs.kv_group if _gapped(cuts) else 0)
    assert cuts.ratio_of(lower) <= cuts.ratio_of(higher) + unit / cuts.costs.block + 1e-9


def _gapped(cuts: PrunableUnits) -> bool:
    """Whether the channels cannot bridge the step from one count of groups to the next."""
    steps = [above - below for above, below in pairwise(cuts.kv_counts)]
    free = cuts.dense.channels - max(1, round(0.05 * cuts.dense.channels))
    return any(step * cuts.costs.kv_group > free * cuts.costs.channel for step in steps)


@given(any_cuts())
def test_nothing_leaves_at_ratio_zero(cuts: PrunableUnits) -> None:
    assert cuts.widths_at(0) == UnitCounts(cuts.dense.kv_heads, cuts.dense.channels)
    assert cuts.ratio_of(cuts.widths_at(0)) == 0


@given(any_cuts(), RATIOS, st.lists(st.floats(0, 1), max_size=6))
def test_on_any_way_nothing_comes_back_and_it_ends_exactly_at_the_end(
    cuts: PrunableUnits, final: float, shares: list[float]
) -> None:
    """A device follows rising ratios in steps of any size; where it stops is where one cut would have led."""
    end = cuts.widths_at(final)
    now = cuts.widths_at(0)
    for share in [*sorted(shares), 1.0]:
        ratio = share * final
        following = cuts.widths_at(ratio, now, end)
        assert following.kv_heads in cuts.kv_counts
        assert end.kv_heads <= following.kv_heads <= now.kv_heads
        assert end.channels <= following.channels <= now.channels
        now = following
    assert now == end


def test_a_group_that_leaves_late_takes_no_more_than_was_ordered() -> None:
    """Channels that have left for a lower ratio cannot come back for the group: before, both were gone."""
    cuts = PrunableUnits(BlockCosts(6976, 1536, 96, BlockShape(4, 2, 8, 40)), (2, 1))
    now = cuts.widths_at(0.24)
    assert now.kv_heads == 2
    assert cuts.widths_at(0.26).kv_heads == 1
    assert cuts.ratio_of(cuts.widths_at(0.26, now)) == pytest.approx(0.26, abs=0.5 * 96 / 6976)


@given(st.integers(1, 200), st.floats(0, 0.9), st.floats(0, 0.9))
def test_the_ramp_rises_from_where_it_starts_to_where_it_ends(steps: int, one: float, other: float) -> None:
    start, end = sorted((one, other))
    values = [ramp(step, steps, start, end) for step in range(steps + 1)]
    assert values[0] == pytest.approx(start, abs=1e-12)
    assert values[-1] == pytest.approx(end, abs=1e-12)
    assert all(low <= high + 1e-12 for low, high in pairwise(values))
    for step, value in enumerate(values):
        if step <= 0.1 * steps:
            assert value == pytest.approx(start)
        if step >= 0.9 * steps:
            assert value == pytest.approx(end, abs=1e-9)


def test_half_way_the_cubic_ramp_has_gone_seven_eighths() -> None:
    assert ramp(50, 100, 0.0, 0.8) == pytest.approx(0.7)


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 3), st.integers(2, 30), st.data())
def test_the_most_important_of_what_is_left_stays(
    seed: int, kv_heads: int, group_size: int, channels: int, data: st.DataObject
) -> None:
    dense = BlockShape(kv_heads * group_size, kv_heads, 4, channels)
    generator = torch.Generator().manual_seed(seed)
    importance = [
        Importance(torch.rand(dense.heads, generator=generator), torch.rand(channels, generator=generator))
        for _ in range(3)
    ]
    masks = Masks.full((dense,) * 3)
    now = UnitCounts(kv_heads, channels)
    for _ in range(2):
        widths = UnitCounts(data.draw(st.integers(1, now.kv_heads)), data.draw(st.integers(1, now.channels)))
        cut = narrowed(masks, widths, importance, dense)
        for before, after, scores in zip(masks.blocks, cut.blocks, importance, strict=True):
            assert after.shape_after(dense) == BlockShape(
                widths.kv_heads * group_size, widths.kv_heads, 4, widths.channels
            ), "whole groups, the same number in every block"
            by_group = scores.heads.view(kv_heads, group_size).sum(dim=1)
            for values, were, are in (
                (by_group, before.kv_heads(dense), after.kv_heads(dense)),
                (scores.channels, before.channels, after.channels),
            ):
                assert not bool((are & ~were).any()), "nothing comes back"
                gone = were & ~are
                if bool(gone.any()):
                    assert float(values[gone].max()) <= float(values[are].min())
        masks, now = cut, widths


def test_equal_scores_keep_the_first_units() -> None:
    dense = BlockShape(4, 4, 4, 6)
    cut = narrowed(Masks.full((dense,) * 1), UnitCounts(2, 3), [Importance.zeros(dense)], dense)
    assert cut.blocks[0].heads.tolist() == [True, True, False, False]
    assert cut.blocks[0].channels.tolist() == [True] * 3 + [False] * 3


def test_widths_of_different_blocks_are_refused() -> None:
    dense = BlockShape(4, 4, 4, 6)
    cuts = PrunableUnits(BlockCosts(1000, 50, 20, dense), (4, 3, 2, 1))
    one = narrowed(Masks.full((dense,) * 1), UnitCounts(2, 3), [Importance.zeros(dense)], dense)
    other = narrowed(Masks.full((dense,) * 1), UnitCounts(2, 4), [Importance.zeros(dense)], dense)
    with pytest.raises(ValueError, match="differ"):
        cuts.widths_of(type(one)((*one.blocks, *other.blocks)))


PRUNED: dict[str, Recipe] = {
    "llama grouped": recipe("llama", grouped=True),
    "qwen2": VARIANTS["qwen2"],
    "opt": VARIANTS["opt"],
    "bert": classifier("bert"),
    "roberta bare": VARIANTS["roberta bare"],
    "phi3": VARIANTS["phi3"],
}


def test_heads_of_a_fused_projection_stay(opened: Any) -> None:
    assert PrunableUnits.of(opened(recipe("llama", grouped=True))).kv_counts == (2, 1)
    assert PrunableUnits.of(opened(VARIANTS["phi3"])).kv_counts == (2,)


@pytest.mark.parametrize("score", ["lora", "salience"])
@pytest.mark.parametrize("made", PRUNED.values(), ids=PRUNED.keys())
def test_pruning_in_the_loop_keeps_its_promises(requests: Any, made: Recipe, score: Any) -> None:
    """Ratio monotone, parameters as ordered, widths alike, finite importance, and factors in the shape of the masks."""
    bench = Bench(requests(made))
    cuts = bench.base.cuts
    final = cuts.ratio_of(cuts.widths_at(0.5))
    stand = 0.0
    for number, target in enumerate((0.3 * final, 0.6 * final, 0.9 * final, final)):
        reply = bench.train(number, pruning={"target": target, "final": final, "interval": 2, "score": score})
        masks = bench.masks_in(reply)
        widths = cuts.widths_of(masks)
        ratio = cuts.ratio_of(widths)
        assert ratio == reply.header["ratio"]
        assert ratio >= stand
        group = max(cuts.costs.kv_group, cuts.costs.channel) / cuts.costs.block
        assert abs(ratio - target) <= group
        for name, value in reply.tensors.items():
            if name.startswith("importance."):
                assert bool(torch.isfinite(value).all())
        rows, columns = bench.base.kept_units(masks)
        shapes = bench.base.target_shapes()
        for name, (d_out, d_in) in shapes.items():
            assert reply.tensors[f"lora.{name}.b"].shape == (len(rows.get(name, range(d_out))), 4)
            assert reply.tensors[f"lora.{name}.a"].shape == (4, len(columns.get(name, range(d_in))))
        stand = ratio
        bench.accept(number, reply)
    assert cuts.widths_of(masks) == cuts.widths_at(0.5)
    assert rows


def test_only_measuring_cuts_nothing(requests: Any) -> None:
    bench = Bench(requests())
    reply = bench.train(
        0, pruning={"target": 0.4, "final": 0.4, "interval": 2, "score": "salience", "collect_only": True}
    )
    assert reply.header["ratio"] == 0
    assert any(bool(value.any()) for name, value in reply.tensors.items() if name.startswith("importance."))


@given(any_cuts(), RATIOS)
def test_what_is_reached_is_stable(cuts: PrunableUnits, ratio: float) -> None:
    """Asking for the ratio that was reached changes nothing by more than a channel."""
    reached = cuts.ratio_of(cuts.widths_at(ratio))
    assume(not _gapped(cuts))
    assert abs(cuts.ratio_of(cuts.widths_at(reached)) - reached) <= 0.5 * cuts.costs.channel / cuts.costs.block + 1e-9
