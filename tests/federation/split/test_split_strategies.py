from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import VARIANTS, classifier
from hypothesis import given
from hypothesis import strategies as st
from small_splits import LLAMA, SplitMaker, Watched, planned
from sums import digest

from spinecli.data.config import Task
from spinecli.errors import FederationError, OptionError
from spinecli.federation.config import SPLITTING
from spinecli.federation.split import rounds
from spinecli.federation.split.control.batches import whole_rows
from spinecli.federation.split.messages import TRAINED
from spinecli.federation.split.request import SPLIT_STRATEGIES, rows_within
from spinecli.federation.split.run import evaluate, set_up
from spinecli.federation.strategies import STRATEGIES

every_strategy = pytest.mark.parametrize("strategy", SPLIT_STRATEGIES)
COHORT = {"slow-00": 2, "fast-00": 6, "fast-01": 3}


def test_the_federation_knows_the_names_of_all_of_them() -> None:
    assert tuple(SPLIT_STRATEGIES) == SPLITTING
    assert not set(SPLITTING) & set(STRATEGIES)


@pytest.mark.parametrize("counts", [(), (5,), (0, 0), (3, 2, 1), (10**6, 1)])
def test_a_device_that_counts_other_labels_is_named(splits: SplitMaker, counts: tuple[int, ...]) -> None:
    request = splits()
    engine = set_up(request).training.engine
    nodes = engine.nodes()
    engine.nodes = lambda: [replace(nodes[0], label_counts=counts), *nodes[1:]]  # type: ignore[method-assign]
    with pytest.raises(FederationError, match=nodes[0].name):
        set_up(request, engine)


@given(rows=st.integers(1, 5000), row_bytes=st.floats(1, 1e7))
def test_an_ingress_of_whole_rows_holds_them_all(rows: int, row_bytes: float) -> None:
    assert whole_rows(rows_within(rows * row_bytes, row_bytes)) == rows


@every_strategy
@pytest.mark.parametrize("task", ["classification", "language"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_two_rounds_end_to_end(splits: SplitMaker, strategy: str, task: Task, way: str) -> None:
    rate = 0.02 if way == "lora" else 0.002
    watched = Watched(splits(strategy=strategy, task=task, bottom=way, top=way, rounds=2, learning_rate=rate))
    start = watched.trained
    records = watched.go_on()
    assert len(records) == 2
    for record in records:
        assert record.evaluation is not None
        assert math.isfinite(record.evaluation.loss)
        assert all(device.lost is None and device.batch >= 1 for device in record.devices)
    changed = {name for name, value in watched.trained.items() if not torch.equal(value, start[name])}
    model = watched.federation.model
    assert changed & set(model.bottom_names)
    assert changed & set(model.top_names) or not model.top_names
    assert model.top_names or strategy == "fedavg"  # which has all blocks in what devices train


@every_strategy
@pytest.mark.parametrize("made", [VARIANTS["opt"], classifier("bert"), VARIANTS["qwen3"]], ids=lambda made: made.family)
def test_other_families_end_to_end(splits: SplitMaker, strategy: str, made: Any) -> None:
    records = Watched(splits(made, strategy=strategy, rounds=2, local_steps=1, learning_rate=0.01)).go_on()
    assert len(records) == 2
    assert all(record.evaluation is not None and math.isfinite(record.evaluation.loss) for record in records)


@every_strategy
def test_training_learns(splits: SplitMaker, strategy: str) -> None:
    """On what they train on; the sets are too small to tell of anything else."""
    watched = Watched(splits(strategy=strategy, rounds=5, cohort=5, largest_batch=8, learning_rate=0.01))
    model, data = watched.federation.model, watched.request.train
    before = evaluate(model, watched.trained, data)
    watched.go_on()
    after = evaluate(model, watched.trained, data)
    assert after.loss < 0.8 * before.loss
    assert after.accuracy > before.accuracy


def test_what_each_strategy_leaves_out(splits: SplitMaker) -> None:
    plain = splits()
    told = {name: replace(plain, strategy=strategy).control() for name, strategy in SPLIT_STRATEGIES.items()}
    assert (told["mergesfl"].selection, told["mergesfl"].divergence_limit) == ("greedy", 0.05)
    for name in ("sfl-fm", "sfl-br", "splitfed", "fedavg"):
        assert told[name].selection == "random"
        assert told[name].divergence_limit == math.inf
    assert {name for name, options in told.items() if options.regulation} == {"mergesfl", "sfl-br"}
    assert {name for name, strategy in SPLIT_STRATEGIES.items() if strategy.merged} == {"mergesfl", "sfl-fm"}
    assert {name for name, strategy in SPLIT_STRATEGIES.items() if not strategy.split} == {"fedavg"}
    assert all(options.budget_rows == plain.row_budget for options in told.values())


@pytest.mark.parametrize("strategy", ["sfl-fm", "splitfed", "fedavg"])
def test_without_regulation_batches_are_equal(splits: SplitMaker, strategy: str) -> None:
    for record in Watched(splits(strategy=strategy, rounds=4)).go_on():
        assert {device.batch for device in record.devices} == {4}


def test_with_regulation_fast_devices_take_more(splits: SplitMaker) -> None:
    batches: dict[str, list[int]] = {"slow": [], "fast": []}
    for record in Watched(splits(strategy="sfl-br", rounds=8, cohort=5, local_steps=1)).go_on():
        for device in record.devices:
            batches[device.device.split("-")[0]].append(device.batch)
    assert batches["slow"]
    assert sum(batches["fast"]) / len(batches["fast"]) > 1.5 * sum(batches["slow"]) / len(batches["slow"])


@pytest.mark.parametrize("merged", [True, False])
def test_the_bottoms_are_averaged_by_their_batches(splits: SplitMaker, merged: bool) -> None:
    watched = Watched(splits(strategy="sfl-fm" if merged else "splitfed", rounds=1, local_steps=3))
    with patch.object(rounds, "plan_round", lambda *_: planned(COHORT)):
        watched.go_on()
    ends = {job.device: outcome.message.tensors for job, outcome in watched.exchanges[-1]}  # type: ignore[union-attr]
    for name, value in watched.training.bottom.items():
        expected = sum(ends[device][TRAINED + name] * (rows / 11) for device, rows in COHORT.items())
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_splitfeds_tops_are_averaged_by_their_batches(splits: SplitMaker) -> None:
    watched = Watched(splits(strategy="splitfed", rounds=1, local_steps=3))
    top: Any = watched.training.top
    tops: dict[str, Any] = {}
    end = top.end

    def ending(weights: Any) -> None:
        assert weights == {device: 3 * rows for device, rows in COHORT.items()}
        tops.update({device: {k: v.detach().clone() for k, v in own.items()} for device, own in top._tops.items()})
        end(weights)

    top.end = ending
    with patch.object(rounds, "plan_round", lambda *_: planned(COHORT)):
        watched.go_on()
    assert len({digest(own) for own in tops.values()}) == 3
    for name, value in top.trained.items():
        expected = sum(tops[device][name] * (rows / 11) for device, rows in COHORT.items())
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_a_device_lost_at_the_end_weighs_nothing_in_either_half(splits: SplitMaker) -> None:
    watched = Watched(splits(strategy="splitfed", rounds=6, local_steps=4, fleet={"dropout": 0.3}, cohort=5))
    seen: list[set[str]] = []
    top: Any = watched.training.top
    end = top.end

    def ending(weights: Any) -> None:
        seen.append(set(weights))
        end(weights)

    top.end = ending
    records = watched.go_on()
    lost = [{device.device for device in record.devices if device.lost} for record in records]
    assert any(lost)
    for record, weighed, gone in zip(records, seen, lost, strict=True):
        assert not weighed & gone
        assert weighed <= {device.device for device in record.devices}
    completed = watched.training.state.participations
    assert completed == {name: sum(name in each for each in seen) for name in completed}
    assert sum(completed.values()) == sum(map(len, seen))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_small_features_train_nearly_the_same(splits: SplitMaker, dtype: Any) -> None:
    losses = []
    for kind in ("fp32", dtype):
        watched = Watched(splits(strategy="sfl-fm", feature_dtype=kind, rounds=2, learning_rate=0.005))
        watched.go_on()
        losses.append([loss for loss in watched.losses() if loss is not None])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_the_ingress_budget_is_kept_and_smaller_features_fill_it_with_more_rows(splits: SplitMaker) -> None:
    rows = {}
    kinds: list[Any] = ["fp32", "int8"]
    for kind in kinds:
        request = splits(feature_dtype=kind, cohort=5, rounds=3, ingress=0.02)
        watched = Watched(request)
        records = watched.go_on()
        for record in records:
            assert sum(device.batch for device in record.devices) <= 20_000 / request.row_bytes
        rows[kind] = sum(device.batch for device in records[-1].devices)
    assert rows["int8"] > 2 * rows["fp32"]


@pytest.mark.parametrize("ingress", [0.0, -1.0, math.nan, math.inf])
def test_an_ingress_that_is_none_is_refused(splits: SplitMaker, ingress: float) -> None:
    with pytest.raises(OptionError, match="--ingress"):
        splits(ingress=ingress)


def test_parameters_tell_everything_that_decides(splits: SplitMaker) -> None:
    told = splits(LLAMA, bottom="full", feature_dtype="bf16", selection="genetic").parameters()
    assert told["cut_layer"] == 1
    assert told["bottom"] == "full"
    assert told["feature_dtype"] == "bf16"
    assert told["selection"] == "genetic"
    assert "sparsity" not in told
