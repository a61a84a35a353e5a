from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import VARIANTS, Recipe, classifier, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from small_splits import LLAMA, SplitMaker, fleet_text, random_batch, split_configs, split_model

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import OptionError
from spinecli.federation.planning.workload import head_of
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.simulation.fleet import Fleet, load_fleet
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.request import Demand, choose_cut
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.factors import target_projections

Opened = Callable[[Recipe], Checkpoint]

RECIPES = {
    "llama": LLAMA,
    "llama biases": VARIANTS["llama biases"],
    "qwen3": VARIANTS["qwen3"],
    "opt": VARIANTS["opt untied"],
    "bert": classifier("bert"),
    "roberta": classifier("roberta"),
}
every_recipe = pytest.mark.parametrize("name", RECIPES)
HEADS = [("classification", name) for name in RECIPES] + [("language", "llama"), ("language", "opt")]
every_head = pytest.mark.parametrize(("task", "name"), HEADS)


def costs_of(
    checkpoint: Checkpoint, cut: int, task: str = "classification", optimizer: str = "adamw", **modes: Any
) -> SplitCosts:
    head = head_of(checkpoint, 3 if task == "classification" else None)
    split, lora = split_configs(**{"rank": 3, "optimizer": optimizer, **modes})
    return SplitCosts.of(checkpoint, cut, split, lora, head)


@every_head
@pytest.mark.parametrize("targets", ["all", "query-value"])
def test_both_halves_cost_what_the_whole_model_does(opened: Opened, task: str, name: str, targets: str) -> None:
    checkpoint = opened(RECIPES[name])
    head = head_of(checkpoint, 3 if task == "classification" else None)
    for way in ("lora", "full"):
        ranks = [3 if way == "lora" else 0] * checkpoint.blocks
        whole = TrainingCosts.of(
            checkpoint,
            target_projections(checkpoint.family, targets),
            head.weights,
            head.per_token,
            head_trained=head.trained,
        ).step([checkpoint.shape] * checkpoint.blocks, ranks, 5, 11)
        for cut in range(1, checkpoint.blocks):
            costs = costs_of(checkpoint, cut, task, bottom=way, top=way, targets=targets)
            bottom, top = costs.bottom(5, 11), costs.top(5, 11)
            assert bottom.forward_flops + top.forward_flops == whole.forward_flops
            assert costs.whole(5, 11).flops == bottom.flops + top.flops
            if way == "lora":
                assert bottom.backward_flops + top.backward_flops == whole.backward_flops
            else:
                blocks = whole.forward_flops - 2 * head.weights * (55 if head.per_token else 5)
                assert bottom.backward_flops + top.backward_flops >= 2 * blocks


@every_recipe
@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_deeper_cut_moves_work_and_memory_to_the_devices(opened: Opened, name: str, way: str) -> None:
    checkpoint = opened(RECIPES[name])
    deeper = [costs_of(checkpoint, cut, bottom=way, top=way) for cut in range(1, checkpoint.blocks + 1)]
    for less, more in itertools.pairwise(deeper):
        assert less.bottom(4, 9).flops < more.bottom(4, 9).flops
        assert less.top(4, 9).flops > more.top(4, 9).flops
        assert less.bottom_memory(4, 9) < more.bottom_memory(4, 9)
        assert less.bottom_parameters() < more.bottom_parameters()


@every_recipe
def test_memory_grows_with_every_row_and_token(opened: Opened, name: str) -> None:
    checkpoint = opened(RECIPES[name])

    @settings(max_examples=10)
    @given(st.integers(0, 64), st.integers(1, 64), st.integers(1, 3), st.sampled_from(["lora", "full"]))
    def holds(rows: int, length: int, cut: int, way: str) -> None:
        costs = costs_of(checkpoint, cut, bottom=way)
        now = costs.bottom_memory(rows, length)
        row = costs.bottom_memory(rows + 1, length) - now
        assert row > 0
        assert costs.bottom_memory(rows + 2, length) - now == 2 * row
        assert costs.bottom_memory(rows + 1, length + 1) > costs.bottom_memory(rows + 1, length)
        thrifty = costs_of(checkpoint, cut, bottom=way, optimizer="sgd")
        assert thrifty.bottom_memory(rows, length) < now
        assert thrifty.bottom(4, length) == costs.bottom(4, length)

    holds()


@every_recipe
def test_the_parameters_counted_are_those_that_travel(opened: Opened, name: str) -> None:
    checkpoint = opened(RECIPES[name])
    for cut in range(1, checkpoint.blocks):
        for way in ("lora", "full"):
            model = split_model(checkpoint, cut, bottom=way, rank=3)
            real = sum(value.numel() for value in model.bottom_start.values())
            counted = costs_of(checkpoint, cut, bottom=way).bottom_parameters()
            if way == "lora":
                assert counted == real
            else:  # a norm or pooler behind the blocks is counted with the embeddings
                assert real <= counted <= real + 2 * 32 + 32 * 33


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_memory_is_what_a_device_really_keeps(opened: Opened, name: str, way: str) -> None:
    """All the features' graph holds for backward beside weights, within a fifth."""
    model = split_model(opened(RECIPES[name]), 2, bottom=way, rank=3)
    costs = costs_of(opened(RECIPES[name]), 2, bottom=way)
    bottom = {key: value.clone().requires_grad_(True) for key, value in model.bottom_start.items()}
    weights = {value.untyped_storage().data_ptr() for value in (*bottom.values(), *model.model.state_dict().values())}
    weights |= {each.weight.untyped_storage().data_ptr() for each in model._adapted.values()}

    def kept(rows: int) -> int:
        seen: dict[int, int] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in weights and value.is_floating_point():
                seen[storage.data_ptr()] = storage.nbytes()
                alive.append(value)
            return value

        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            features = model.features(bottom, random_batch([16] * rows))
        del features
        return sum(seen.values())

    real = (kept(24) - kept(8)) / 16
    counted = costs.bottom_memory(1, 16) - costs.bottom_memory(0, 16)
    assert counted == pytest.approx(real, rel=0.35)


@pytest.fixture
def fleet(tmp_path: Any) -> Fleet:
    place = tmp_path / "few.toml"
    place.write_text(fleet_text())
    return load_fleet(str(place))


def demand(memory: float = 1e6, flops: float = 0, feature_bytes: int = 10_000) -> Demand:
    return Demand(int(memory), int(flops), feature_bytes, 0.0)


def test_the_deepest_cut_that_costs_next_to_no_time_is_taken(fleet: Fleet) -> None:
    light = {cut: demand(flops=cut * 1e3) for cut in range(1, 9)}
    assert choose_cut(light, fleet, 0) == 8
    heavy = {cut: demand(flops=cut * 1e9) for cut in range(1, 9)}
    assert choose_cut(heavy, fleet, 0) == 1
    bent = {cut: demand(flops=1e3 if cut <= 5 else 1e10) for cut in range(1, 9)}
    assert choose_cut(bent, fleet, 0) == 5


def test_the_smallest_class_must_hold_the_cut(fleet: Fleet) -> None:
    steps = {cut: demand(memory=cut * 3e8) for cut in range(1, 9)}
    assert choose_cut(steps, fleet, 0) == 3  # of 1 GB
    with pytest.raises(OptionError, match=r"class slow have 1 GB, and the bottom model cut before block 1 needs 2 GB"):
        choose_cut({1: demand(memory=2e9), 2: demand(memory=3e9)}, fleet, 0)


@given(
    st.lists(st.tuples(st.floats(1e5, 1.5e9), st.floats(1e3, 1e10)), min_size=1, max_size=8),
    st.integers(1, 10**6),
    st.integers(0, 5),
)
def test_the_chosen_cut_fits_and_is_no_slower_than_a_tenth(
    asked: list[tuple[float, float]], size: int, seed: int
) -> None:
    fleet = load_fleet("jetson-10")
    smallest = min(found.memory_bytes for found in fleet.classes)
    asked = sorted((memory * smallest / 1e9, flops) for memory, flops in asked)
    demands = {cut: demand(memory, flops, size) for cut, (memory, flops) in enumerate(asked, 1)}
    fitting = [cut for cut, each in demands.items() if each.memory_bytes <= smallest]
    if not fitting:
        with pytest.raises(OptionError, match="lower --batch-size"):
            choose_cut(demands, fleet, seed)
        return

    def slowest(cut: int) -> float:
        present = [replace(conditions(device, seed, 0), jitter=1.0) for device in fleet.devices]
        return max(demands[cut].seconds(now) for now in present)

    chosen = choose_cut(demands, fleet, seed)
    assert chosen in fitting
    assert slowest(chosen) <= 1.1 * slowest(fitting[0])
    assert all(slowest(cut) > 1.1 * slowest(fitting[0]) for cut in fitting if cut > chosen)


def test_a_cut_that_nobody_names_is_chosen(splits: SplitMaker) -> None:
    made = recipe("llama", grouped=True, blocks=5)
    request = splits(made, cut_layer="auto")
    assert 1 <= request.cut < 5
    assert splits(made, cut_layer=3).cut == 3
    assert splits(made, cut_layer="auto", strategy="fedavg").cut == 5


def test_a_cut_is_refused_where_nothing_is_split(splits: SplitMaker) -> None:
    with pytest.raises(OptionError, match="--cut-layer has no effect with fedavg"):
        splits(strategy="fedavg", cut_layer=1)


@pytest.mark.parametrize("cut", [0, -1, 3, 17])
def test_a_cut_outside_of_the_model_is_refused(splits: SplitMaker, cut: int) -> None:
    with pytest.raises(OptionError, match=f"--cut-layer {cut} must leave blocks on both sides: from 1 to 2"):
        splits(cut_layer=cut)


def test_a_model_of_one_block_is_not_split(splits: SplitMaker) -> None:
    with pytest.raises(OptionError, match="one block"):
        splits(recipe("llama", blocks=1), cut_layer="auto")
