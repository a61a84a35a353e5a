"""Widths of their own for every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Recipe, recipe
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import BlockCosts
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.config import read_config
from spinecli.data.config import CalibrationConfig
from spinecli.errors import OptionError
from spinecli.pruning.adaptive.allocation import AdaptiveBudget, allocate_adaptively
from spinecli.pruning.adaptive.damage import DamageCurve, Sensitivity, damage_curve, lower_hull, tempered
from spinecli.pruning.config import PruneConfig, TuneConfig, Widths
from spinecli.pruning.decision import planned
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request
from spinecli.pruning.run import dry_run, prune

SHAPE = BlockShape(heads=8, kv_heads=4, head_dim=4, channels=80)
COSTS = BlockCosts(
    block=4 * 500 + 80 * 30 + 40, kv_group=500, channel=30, dense=SHAPE, attention_rest=20, feed_forward_rest=20
)
LLAMA = recipe("llama", grouped=True, blocks=4)


@st.composite
def curves(draw: st.DrawFn) -> list[DamageCurve]:
    """Rising curves of four blocks, of very different heights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    found = []
    for block in range(4):
        for sub_layer, units, unit in (("attention", 4, 500), ("mlp", 80, 30)):
            steps = torch.rand(units, generator=generator, dtype=torch.float64) * 10 ** draw(st.integers(-3, 1))
            damage = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
            found.append(DamageCurve(block, sub_layer, damage, unit))
    return found


def budget(sparsity: float, round_to: int = 8, protected: frozenset[int] = frozenset({0})) -> AdaptiveBudget:
    return AdaptiveBudget(sparsity, [COSTS] * 4, round_to, protected, heads_leave=True)


@given(curves(), st.floats(0.1, 0.7), st.sampled_from([1, 8]))
def test_the_budget_is_met_to_within_a_step_and_the_floors_hold(
    found: list[DamageCurve], sparsity: float, round_to: int
) -> None:
    wanted = budget(sparsity, round_to)
    allocation = allocate_adaptively(wanted, found, frozenset(), 1.0)
    assert allocation is not None
    kept = sum(COSTS.parameters(shape) for shape in allocation.shapes)
    assert allocation.sparsity == pytest.approx(1 - kept / wanted.whole)
    assert abs(allocation.sparsity - sparsity) * wanted.whole <= round_to * COSTS.channel
    for shape in allocation.shapes:
        assert shape.heads == 2 * shape.kv_heads
        assert shape.channels % round_to == 0
    assert allocation.shapes[0].kv_heads >= 1
    assert allocation.shapes[0].channels >= round_to


@given(curves(), st.floats(0.2, 0.6))
def test_no_single_exchange_of_channels_costs_less(found: list[DamageCurve], sparsity: float) -> None:
    """With convex curves the greedy answer cannot be bettered by taking a channel here instead of there."""
    convex = [replace(curve, damage=curve.damage.square()) for curve in found]
    for curve in convex:
        increments = curve.damage.diff().sort().values
        curve.damage[1:] = increments.cumsum(0)
    allocation = allocate_adaptively(budget(sparsity, round_to=1, protected=frozenset()), convex, frozenset(), 1.0)
    assert allocation is not None
    gone = [SHAPE.channels - shape.channels for shape in allocation.shapes]
    feeds = [curve for curve in convex if curve.sub_layer == "mlp"]
    taken = [float(curve.damage[n] - curve.damage[n - 1]) for curve, n in zip(feeds, gone, strict=True) if n]
    free = [float(curve.damage[n + 1] - curve.damage[n]) for curve, n in zip(feeds, gone, strict=True) if n < 79]
    assert not taken or not free or max(taken) <= min(free) * (1 + 1e-9) + 1e-12


@given(curves())
def test_removed_blocks_are_gone_and_the_rest_pays_less(found: list[DamageCurve]) -> None:
    allocation = allocate_adaptively(budget(0.5), found, frozenset({2}), 1.0)
    assert allocation is not None
    assert (allocation.shapes[2].heads, allocation.shapes[2].channels) == (0, 0)
    assert allocation.removed_blocks >= 1


def test_a_block_that_matters_keeps_its_width() -> None:
    height = [1e-3, 10.0, 1e-3, 1e-3]
    rising = torch.arange(81, dtype=torch.float64).square()
    groups = torch.arange(5, dtype=torch.float64) * 1e9
    found = [DamageCurve(block, "mlp", rising * height[block], 30) for block in range(4)]
    found += [DamageCurve(block, "attention", groups, 500) for block in range(4)]
    allocation = allocate_adaptively(budget(0.3), found, frozenset(), 1.0)
    assert allocation is not None
    assert allocation.shapes[1].channels > 72
    assert all(allocation.shapes[block].channels < 60 for block in (0, 2, 3))
    alike = allocate_adaptively(budget(0.3), tempered(found, 0.0), frozenset(), 0.0)
    assert alike is not None
    widths = [shape.channels for shape in alike.shapes]
    assert max(widths) - min(widths) <= 8


@given(st.integers(0, 9999))
def test_the_hull_is_convex_and_below(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.zeros(1), torch.rand(30, generator=generator).cumsum(0)]).double()
    hull = lower_hull(values, range(31))
    assert (hull[0], hull[-1]) == (0, 30)
    slopes = [float(values[stop] - values[start]) / (stop - start) for start, stop in pairwise(hull)]
    assert slopes == sorted(slopes)
    for start, stop in pairwise(hull):
        for step in range(start, stop + 1):
            line = values[start] + (values[stop] - values[start]) * (step - start) / (stop - start)
            assert values[step] >= line - 1e-12


@given(st.floats(1e-4, 1.0), st.floats(1.0, 50.0), st.integers(2, 40))
def test_a_curve_goes_through_what_was_measured(half: float, factor: float, units: int) -> None:
    errors = torch.linspace(0, 1, units + 1, dtype=torch.float64) ** 2
    curve = damage_curve(0, "mlp", errors, 1, Sensitivity(half, half * factor))
    assert curve.damage[0] == 0
    assert (curve.damage.diff() >= 0).all()
    assert float(curve.damage[units - (units + 1) // 2]) == pytest.approx(half)


@pytest.fixture
def options(written: Callable[[Recipe], Path], sample_file: Path) -> Callable[..., PruneConfig]:
    def make(made: Recipe = LLAMA, **changes: Any) -> PruneConfig:
        plain: dict[str, Any] = {
            "model": str(written(made)),
            "sparsity": 0.4,
            "widths": Widths.adaptive,
            "round_to": 4,
            "calibration": CalibrationConfig(text=str(sample_file), rows=12, length=16),
        }
        return read_config(PruneConfig, None, plain | changes)

    return make


def logits(directory: Path) -> Tensor:
    return streamed_logits(Checkpoint.open(directory), torch.arange(24).view(2, 12))


def test_the_best_of_all_comparisons_is_taken(options: Callable[..., PruneConfig]) -> None:
    request = open_request(options())
    decision = dry_run(request)
    report: dict[str, Any] = decision.report()
    kinds = {judged["widths"] for judged in report["compared"]}
    assert kinds == {"uniform", "adaptive"}
    best = min(decision.scored, key=lambda each: each.held_out)
    assert decision.candidate is best.candidate
    assert abs(planned(request, decision).sparsity - 0.4) < 0.03
    assert decision.candidate.shapes[0].heads, "the cache counts its length in block 0"


def test_adaptive_pruning_goes_on_through_tuning_and_pruning_again(
    options: Callable[..., PruneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.pruning.decision._best", _most_varied)
    prune(open_request(options()), OutputOptions(tmp_path / "one"))
    cut = Checkpoint.open(tmp_path / "one")
    assert cut.family.model_type == "varied_mistral"
    assert not cut.is_uniform
    tune(open_tune(TuneConfig(pruned=tmp_path / "one")), OutputOptions(tmp_path / "tuned"))
    assert Checkpoint.open(tmp_path / "tuned").shapes == cut.shapes
    again = options(model=str(tmp_path / "one"), sparsity=0.2, widths=None)
    prune(open_request(again), OutputOptions(tmp_path / "two"))
    masks = Masks.load(tmp_path / "two")
    assert masks.fit(cut.shapes)
    assert Checkpoint.open(tmp_path / "two").shapes == masks.shapes_after(cut.shapes)
    assert logits(tmp_path / "two").isfinite().all()


def _most_varied(scored: Any) -> Any:
    def widths(judged: Any) -> int:
        return len(set(judged.candidate.shapes))

    return max(scored, key=widths).candidate


def test_the_same_command_gives_the_same_bytes(options: Callable[..., PruneConfig], tmp_path: Path) -> None:
    for name in ("one", "two"):
        prune(open_request(options()), OutputOptions(tmp_path / name))
    assert read_manifest(tmp_path / "one").outputs == read_manifest(tmp_path / "two").outputs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "comp"}, "--widths adaptive belongs to --method spine"),
        ({"made": recipe("opt", blocks=4)}, "cannot differ in width"),
    ],
    ids=["comp", "opt"],
)
def test_who_cannot_vary_is_told(options: Callable[..., PruneConfig], change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_request(options(**change))


def test_the_choice_of_widths_has_two_names() -> None:
    assert PruneConfig(model="m", sparsity=0.3, widths="adaptive").widths is Widths.adaptive  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="uniform, adaptive"):
        read_config(PruneConfig, None, {"model": "m", "sparsity": 0.3, "widths": "free"})
