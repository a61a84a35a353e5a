"""What split training comes to when nothing is lost by splitting: training of the whole model on the merged batch."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from families import Recipe, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from small_splits import LLAMA, NO_CLIPPING, SplitMaker, Watched, batches_of, concatenated, planned, sgd_step
from sums import digest

from spinecli.data.config import Task
from spinecli.federation.split import rounds

PLAIN = {"optimizer": "sgd", "clip_norm": NO_CLIPPING, "local_steps": 1}
DEVICES = ("slow-00", "slow-01", "slow-02", "fast-00", "fast-01")

every_task = pytest.mark.parametrize("task", ["classification", "language"])
every_way = pytest.mark.parametrize("way", ["lora", "full"])


@every_way
@every_task
def test_one_round_of_one_iteration_is_one_step_on_the_merged_batch(splits: SplitMaker, task: Task, way: str) -> None:
    """Whatever the batch sizes: gradients sent with D_S / d_i and bottoms averaged with d_i undo each other."""
    request = splits(task=task, bottom=way, top=way, **PLAIN)
    sizes = st.dictionaries(st.sampled_from(DEVICES), st.integers(1, 9), min_size=1, max_size=5)

    @settings(max_examples=6)
    @given(sizes)
    def holds(cohort: dict[str, int]) -> None:
        watched = Watched(request)
        start = watched.trained
        with patch.object(rounds, "plan_round", lambda *_: planned(cohort)):
            (record,) = watched.go_on(1)
        drawn = batches_of(watched, record)
        assert {device: len(found[0].labels) for device, found in drawn.items()} == cohort
        merged = concatenated([found[0] for found in drawn.values()])
        loss, expected = sgd_step(watched.federation.model, start, merged, record.learning_rate)
        assert watched.losses() == [pytest.approx(loss, abs=1e-5)]
        for name, value in watched.trained.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5, msg=name)
        assert digest(watched.training.bottom) != digest(watched.federation.model.bottom_start)

    holds()


def test_with_equal_weights_it_would_not_be(splits: SplitMaker) -> None:
    """The identity above is no accident of small steps: the uniform mean of the bottoms misses it by far more."""
    watched = Watched(splits(bottom="full", top="full", **PLAIN))
    start, cohort = watched.trained, {"slow-00": 1, "fast-00": 9}
    with (
        patch.object(rounds, "plan_round", lambda *_: planned(cohort)),
        patch.object(rounds, "average_tensors", lambda parts, _: mean_of(parts)),
    ):
        (record,) = watched.go_on(1)
    merged = concatenated([found[0] for found in batches_of(watched, record).values()])
    _, expected = sgd_step(watched.federation.model, start, merged, record.learning_rate)
    assert max(float((value - expected[name]).abs().max()) for name, value in watched.training.bottom.items()) > 1e-3


def mean_of(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}


@every_way
@pytest.mark.parametrize(
    ("made", "task"),
    [(LLAMA, "classification"), (LLAMA, "language"), (recipe("opt"), "language"), (recipe("bert"), "classification")],
    ids=["llama classes", "llama language", "opt language", "bert classes"],
)
def test_with_equal_speeds_and_labels_the_loss_curve_is_that_of_central_training(
    splits: SplitMaker, made: Recipe, task: Task, way: str
) -> None:
    rate = 0.05 if way == "lora" else 0.01
    request = splits(
        made,
        task=task,
        fleet={"equal": True},
        cohort=4,
        rounds=8,
        largest_batch=4,
        bottom=way,
        top=way,
        learning_rate=rate,
        **PLAIN,
    )
    watched = Watched(request)
    trained = watched.trained
    records = watched.go_on()
    assert len(records) == 8
    curve = []
    for record in records:
        drawn = [found[0] for found in batches_of(watched, record).values()]
        assert len(drawn) > 1
        # about the same: rows of another length take another time
        assert max(len(batch.labels) for batch in drawn) <= 2 * min(len(batch.labels) for batch in drawn)
        loss, trained = sgd_step(watched.federation.model, trained, concatenated(drawn), record.learning_rate)
        curve.append(loss)
    assert watched.losses() == [pytest.approx(loss, abs=1e-5) for loss in curve]
    for name, value in watched.trained.items():
        torch.testing.assert_close(value, trained[name], atol=1e-5, rtol=1e-4, msg=name)
    assert min(curve[1:]) < curve[0] - 0.1  # it has learned something, so the curve is no constant


def test_fedavg_is_the_mean_of_whole_models_by_examples(splits: SplitMaker) -> None:
    request = splits(strategy="fedavg", bottom="lora", partition="dirichlet:0.5", cohort=5, rounds=2, **PLAIN)
    watched = Watched(request)
    trained = watched.trained
    for record in watched.go_on():
        parts, examples = [], []
        for device, found in batches_of(watched, record).items():
            loss, after = sgd_step(watched.federation.model, trained, found[0], record.learning_rate)
            parts.append(after)
            examples.append(len(watched.device(device).indices))
            (reported,) = [each for each in record.devices if each.device == device]
            assert reported.loss_before == reported.loss_after == pytest.approx(loss, abs=1e-5)
        trained = {
            name: sum(part[name] * (count / sum(examples)) for part, count in zip(parts, examples, strict=True))
            for name in trained
        }
        assert len(set(examples)) > 1
    for name, value in watched.trained.items():
        torch.testing.assert_close(value, trained[name], atol=1e-5, rtol=1e-5, msg=name)


def test_splitfed_with_one_device_is_central_training_of_several_steps(splits: SplitMaker) -> None:
    """With one device neither merging nor averaging changes anything, however many iterations a round has."""
    losses, ends = [], []
    for strategy in ("splitfed", "mergesfl"):
        changes = {**PLAIN, "local_steps": 4}
        watched = Watched(splits(strategy=strategy, cohort=1, rounds=1, **changes))
        start = watched.trained
        (record,) = watched.go_on()
        curve = []
        (found,) = batches_of(watched, record).values()
        for batch in found:
            loss, start = sgd_step(watched.federation.model, start, batch, record.learning_rate)
            curve.append(loss)
        assert watched.losses() == [pytest.approx(loss, abs=1e-5) for loss in curve]
        for name, value in watched.trained.items():
            torch.testing.assert_close(value, start[name], atol=1e-5, rtol=1e-4, msg=name)
        losses.append(curve)
        ends.append(watched.trained)
    assert len(losses[0]) == len(losses[1]) == 4
