"""Devices that send nonsense, fail, or come late: left out by name, while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from small_splits import SplitMaker, Watched, planned
from sums import digest
from torch import Tensor

from spinecli.artifacts.directory import OutputOptions
from spinecli.data.config import Task
from spinecli.errors import FederationError
from spinecli.federation.launch import launch
from spinecli.federation.messages import Message
from spinecli.federation.split import rounds
from spinecli.federation.split.device import SplitDevice, handle
from spinecli.federation.split.messages import BEGIN, FINISH, GRADIENT, LOCAL, STEP, diverged_message
from spinecli.federation.split.server import UnusableFeaturesError

COHORT = {"slow-00": 4, "slow-01": 3, "slow-02": 2, "fast-00": 5, "fast-01": 4}
CULPRIT = "slow-01"
OTHERS = [device for device in COHORT if device != CULPRIT]
ROWS = COHORT[CULPRIT]

Spoil = Callable[[dict[str, Any], dict[str, Tensor]], None]
"""Changes header and tensors of an answer in place."""


def with_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return spoil


def with_entry(name: str, place: int, value: float) -> Spoil:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[place] = value
        return changed

    return with_tensor(name, change)


def without(name: str) -> Spoil:
    def spoil(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return spoil


def with_extra(name: str) -> Spoil:
    def spoil(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(2)

    return spoil


def with_header(**changes: Any) -> Spoil:
    return lambda header, tensors: header.update(changes)


def without_header(name: str) -> Spoil:
    def spoil(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del header[name]

    return spoil


VALUES, LENGTHS, LABELS = "features.values", "lengths", "labels"

FEATURES: dict[str, tuple[Spoil, str]] = {
    "one token too few": (with_tensor(VALUES, lambda value: value[1:]), "features are"),
    "another width": (with_tensor(VALUES, lambda value: value[:, 1:]), "features are"),
    "one row, not tokens": (with_tensor(VALUES, lambda value: value.flatten()), "features are"),
    "half precision": (with_tensor(VALUES, lambda value: value.half()), "features are"),
    "no features": (without(VALUES), "features are none"),
    "NaN": (with_entry(VALUES, 5, math.nan), "NaN"),
    "infinite": (with_entry(VALUES, 0, -math.inf), "NaN"),
    "huge": (with_tensor(VALUES, lambda value: 3e38 * torch.sign(value)), "no finite numbers"),
    "no lengths": (without(LENGTHS), "how long"),
    "one length too many": (with_tensor(LENGTHS, lambda value: torch.cat([value, value[:1]])), "how long"),
    "lengths as floats": (with_tensor(LENGTHS, lambda value: value.float()), "how long"),
    "an empty row": (with_entry(LENGTHS, 1, 0), "tokens, not 1 to"),
    "a negative length": (with_entry(LENGTHS, 0, -5), "tokens, not 1 to"),
    "a row too long": (with_entry(LENGTHS, 0, 10_000), "tokens, not 1 to"),
    "no labels": (without(LABELS), "labels"),
    "one label too few": (with_tensor(LABELS, lambda value: value[1:]), "labels"),
    "labels as floats": (with_tensor(LABELS, lambda value: value.float()), "labels"),
    "a label out of range": (with_entry(LABELS, 2, 999_999), "label 999999 is not one"),
    "a negative label": (with_entry(LABELS, 0, -1), "label -1 is not one"),
    "an extra tensor": (with_extra("input_ids"), "input_ids was not asked for"),
    "an extra of features": (with_extra("features.more"), "features.more was not asked for"),
    "the iteration before": (with_header(iteration=0), "iteration 0"),
    "the iteration after": (with_header(iteration=2), "iteration 2"),
    "an iteration in words": (with_header(iteration="first"), "iteration"),
    "no iteration": (without_header("iteration"), "iteration"),
    "a header of more": (with_header(trusted=True), "trusted"),
}


def spoiling(kind: str, number: int, spoil: Spoil, first_round_only: bool = True) -> Any:
    """An answer that is spoiled the `number`th time that a request of this kind comes in a round."""
    seen = {"round": -1, "count": 0}

    def answer(asked: str, message: Message, device: SplitDevice) -> Message:
        found = handle(asked, message, device)
        if asked != kind:
            return found
        if seen["round"] != message.header["round"]:
            seen.update(round=message.header["round"], count=0)
        seen["count"] += 1
        if seen["count"] != number or (first_round_only and seen["round"] > 0):
            return found
        header, tensors = dict(found.header), dict(found.tensors)
        spoil(header, tensors)
        return Message(header, tensors)

    return answer


@pytest.fixture(autouse=True)
def everybody_takes_part() -> Iterator[None]:
    with patch.object(rounds, "plan_round", lambda *_: planned(COHORT)):
        yield


def lost_of(record: Any) -> dict[str, tuple[str, str]]:
    return {each.device: (each.lost, each.explanation) for each in record.devices if each.lost is not None}


def steps_of(watched: Watched) -> list[list[str]]:
    """Whose features the top's steps are on, noted from now on."""
    noted: list[list[str]] = []
    step = watched.training.top.step

    def stepping(batches: Any) -> Any:
        found = step(batches)
        noted.append(list(batches))
        return found

    watched.training.top.step = stepping  # type: ignore[method-assign]
    return noted


@pytest.mark.parametrize("name", FEATURES)
def test_spoiled_features_are_refused_and_only_their_step_is_dropped(splits: SplitMaker, name: str) -> None:
    spoil, explanation = FEATURES[name]
    watched = Watched(splits(local_steps=3, rounds=1), {CULPRIT: spoiling(STEP, 1, spoil)})
    steps = steps_of(watched)
    (first,) = watched.go_on()
    assert list(lost_of(first)) == [CULPRIT]
    reason, found = lost_of(first)[CULPRIT]
    assert reason == "refused"
    assert explanation in found
    assert first.split is not None
    losses = [iteration.loss for iteration in first.split.iterations]
    assert losses[1] is None
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in (losses[0], losses[2]))
    assert steps == [list(COHORT), OTHERS]
    dropped = [job for job, _ in watched.exchanges[2]]
    assert [job.device for job in dropped] == OTHERS
    assert not any(job.message.tensors for job in dropped)  # nobody steps for the dropped iteration
    assert all(bool(torch.isfinite(value).all()) for value in watched.trained.values())


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed"])
def test_a_dropped_step_leaves_the_top_where_it_was(splits: SplitMaker, strategy: str) -> None:
    """A run of one iteration whose only step is dropped ends where it began; its bottoms do not count either."""
    spoil, _ = FEATURES["NaN"]
    watched = Watched(splits(local_steps=1, rounds=1, strategy=strategy), {CULPRIT: spoiling(BEGIN, 1, spoil)})
    before = digest(watched.trained)
    (record,) = watched.go_on()
    assert watched.losses() == [None]
    assert list(lost_of(record)) == [CULPRIT]
    assert digest(watched.trained) == before
    assert watched.training.state.participations == {}


def refusing_once(step: Any) -> Any:
    """The server's step, of which the first is dropped."""
    steps = iter([True])

    def stepping(batches: Any) -> Any:
        if next(steps, False):
            raise UnusableFeaturesError([])
        return step(batches)

    return stepping


def test_without_its_culprit_a_round_ends_as_if_it_had_never_begun_with_it(splits: SplitMaker) -> None:
    """Refused in the first iteration, a device leaves no trace but the iteration that was dropped with it."""
    spoil, _ = FEATURES["a label out of range"]
    changes: dict[str, Any] = {"local_steps": 2, "rounds": 1, "optimizer": "sgd"}
    watched = Watched(splits(**changes), {CULPRIT: spoiling(BEGIN, 1, spoil)})
    watched.go_on()
    cohort = {device: COHORT[device] for device in OTHERS}
    other = Watched(splits(**changes))
    with patch.object(rounds, "plan_round", lambda *_: planned(cohort)):
        other.training.top.step = refusing_once(other.training.top.step)  # type: ignore[method-assign]
        other.go_on()
    assert digest(watched.trained) == digest(other.trained)
    assert watched.losses() == other.losses()
    assert watched.losses()[1] is not None


LANGUAGE: dict[str, tuple[Spoil, str]] = {
    "nothing to learn": (with_tensor(LABELS, lambda value: torch.full_like(value, -100)), "nothing to learn"),
    "a token out of range": (with_entry(LABELS, 1, 320), "label 320 is not one"),
    "a negative token": (with_entry(LABELS, 1, -1), "label -1 is not one"),
    "labels of rows": (with_tensor(LABELS, lambda value: value[:ROWS]), "labels"),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_spoiled_texts_are_refused(splits: SplitMaker, name: str) -> None:
    spoil, explanation = LANGUAGE[name]
    watched = Watched(splits(task="language", local_steps=2, rounds=1), {CULPRIT: spoiling(STEP, 1, spoil)})
    (record,) = watched.go_on()
    assert list(lost_of(record)) == [CULPRIT]
    assert explanation in lost_of(record)[CULPRIT][1]
    assert [loss is None for loss in watched.losses()] == [False, True]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_spoiled_small_features_are_refused(splits: SplitMaker, dtype: Any) -> None:
    name = VALUES if dtype == "bf16" else "features.scales"
    spoil = with_entry(name, 1, math.inf)
    watched = Watched(splits(feature_dtype=dtype, local_steps=2, rounds=1), {CULPRIT: spoiling(STEP, 1, spoil)})
    (record,) = watched.go_on()
    assert "NaN or infinite" in lost_of(record)[CULPRIT][1]


def first_trained(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


def on_first(change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = first_trained(tensors)
        tensors[name] = change(tensors[name])

    return spoil


def without_first(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[first_trained(tensors)]


PARAMETERS: dict[str, tuple[Spoil, str]] = {
    "another shape": (on_first(lambda value: value[1:]), "has shape"),
    "NaN": (on_first(lambda value: value * math.nan), "NaN"),
    "infinite": (on_first(lambda value: value / 0), "NaN or infinite"),
    "double precision": (on_first(lambda value: value.double()), "not float32"),
    "complex": (on_first(lambda value: value + 0j), "no message carries"),
    "enormous": (on_first(lambda value: value * 0 + 1e25), "beyond"),
    "one missing": (without_first, "is missing"),
    "one more": (with_extra("trained.more"), "more was not asked for"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_spoiled_bottoms_are_refused_and_the_mean_is_of_the_others(splits: SplitMaker, name: str) -> None:
    spoil, explanation = PARAMETERS[name]
    watched = Watched(splits(local_steps=2, rounds=2), {CULPRIT: spoiling(FINISH, 1, spoil)})
    first, second = watched.go_on()
    assert list(lost_of(first)) == [CULPRIT]
    assert explanation in lost_of(first)[CULPRIT][1]
    assert watched.states[0].strategy.values["control"]["participations"] == dict.fromkeys(sorted(OTHERS), 1)  # type: ignore[index, call-overload]
    bottoms = {
        job.device: outcome.message.tensors
        for job, outcome in watched.exchanges[2]
        if job.device != CULPRIT and not hasattr(outcome, "reason")
    }
    kept = watched.states[0].strategy.tensors
    for tensor in watched.federation.model.bottom_names:
        expected = sum(bottoms[device][f"trained.{tensor}"] * COHORT[device] for device in OTHERS)
        torch.testing.assert_close(kept[f"bottom.{tensor}"], expected / sum(COHORT[device] for device in OTHERS))
    assert lost_of(second) == {}


LOCAL_FIGURES: dict[str, tuple[Spoil, str]] = {
    "no examples": (with_header(examples=0), "examples"),
    "absurdly many examples": (with_header(examples=10**400), "examples"),
    "a loss that is no number": (with_header(loss_after=math.nan), "loss_after"),
    "no figures": (without_header("loss_before"), "loss_before"),
    "more figures": (with_header(bonus=1), "bonus"),
}


@pytest.mark.parametrize("name", [*PARAMETERS, *LOCAL_FIGURES])
def test_spoiled_models_are_refused_by_fedavg(splits: SplitMaker, name: str) -> None:
    spoil, explanation = {**PARAMETERS, **LOCAL_FIGURES}[name]
    watched = Watched(splits(strategy="fedavg", local_steps=1, rounds=2), {CULPRIT: spoiling(LOCAL, 1, spoil)})
    first, second = watched.go_on()
    assert list(lost_of(first)) == [CULPRIT]
    assert lost_of(first)[CULPRIT][0] == "refused"
    assert explanation in lost_of(first)[CULPRIT][1]
    assert lost_of(second) == {}
    assert all(bool(torch.isfinite(value).all()) for value in watched.trained.values())


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed", "fedavg"])
@pytest.mark.parametrize("task", ["classification", "language"])
def test_when_all_are_lost_the_round_is_empty_and_the_run_goes_on(
    splits: SplitMaker, strategy: str, task: Task
) -> None:
    kind = LOCAL if strategy == "fedavg" else BEGIN
    spoil = with_extra("strange")
    watched = Watched(
        splits(strategy=strategy, task=task, rounds=2), {device: spoiling(kind, 1, spoil) for device in COHORT}
    )
    before = digest(watched.trained)
    (first,) = watched.go_on(1)
    assert set(lost_of(first)) == set(COHORT)
    assert digest(watched.trained) == before
    assert first.idle_share == 0.0
    assert first.evaluation is not None
    (second,) = watched.go_on()
    assert lost_of(second) == {}
    assert digest(watched.trained) != before


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed", "fedavg"])
@pytest.mark.parametrize("steps", [1, 3])
def test_devices_that_fail_do_not_stop_the_run(splits: SplitMaker, strategy: str, steps: int) -> None:
    watched = Watched(splits(strategy=strategy, local_steps=steps, rounds=5, fleet={"dropout": 0.3}))
    records = watched.go_on()
    assert len(records) == 5
    failed = [device for record in records for device in lost_of(record)]
    assert len(failed) > 4
    assert all(watched.device(node.name).session is None for node in watched.engine.nodes()), (
        "nothing is held for the lost"
    )
    assert {reason for record in records for reason, _ in lost_of(record).values()} == {"failed"}
    if strategy != "fedavg":
        dropped = [loss is None for loss in watched.losses()]
        assert any(dropped)
        assert not all(dropped)
    for record in records:
        assert record.evaluation is not None
        assert math.isfinite(record.evaluation.loss)
    if steps > 1 and strategy != "fedavg":
        midway = [
            device for record in records for device in record.devices if device.lost and device.compute_seconds > 0
        ]
        assert midway  # some have worked before they failed


@pytest.mark.parametrize("strategy", ["mergesfl", "fedavg"])
def test_who_comes_late_is_left_out(splits: SplitMaker, strategy: str) -> None:
    usual = Watched(splits(strategy=strategy, rounds=1))
    usual.go_on()
    seconds = sorted(outcome.timing.seconds for _, outcome in usual.exchanges[0] if not hasattr(outcome, "reason"))
    deadline = (seconds[1] + seconds[2]) / 2
    watched = Watched(splits(strategy=strategy, rounds=2, deadline=deadline))
    for record in watched.go_on():
        lost = lost_of(record)
        assert 0 < len(lost) < len(COHORT)
        assert {reason for reason, _ in lost.values()} == {"late"}
    exchanged = [
        outcome.timing.seconds
        for exchange in watched.exchanges
        for _, outcome in exchange
        if not hasattr(outcome, "reason")
    ]
    assert max(exchanged) <= deadline


def test_gradients_go_only_to_those_who_took_part(splits: SplitMaker) -> None:
    spoil, _ = FEATURES["NaN"]
    watched = Watched(splits(local_steps=3, rounds=1), {CULPRIT: spoiling(BEGIN, 1, spoil)})
    watched.go_on()
    for exchange in watched.exchanges[1:]:
        assert [job.device for job, _ in exchange] == OTHERS
    sent = [{name for job, _ in exchange for name in job.message.tensors} for exchange in watched.exchanges[1:]]
    assert sent == [set(), {f"{GRADIENT}values"}, {f"{GRADIENT}values"}]


EVERY_SPLIT = ["mergesfl", "sfl-fm", "sfl-br", "splitfed", "fedavg"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("strategy", EVERY_SPLIT)
def test_a_run_that_diverges_stops_in_its_round_with_device_and_round(
    splits: SplitMaker, strategy: str, optimizer: Any
) -> None:
    watched = Watched(splits(strategy=strategy, optimizer=optimizer, learning_rate=1e30, rounds=3, evaluate_every=3))
    with pytest.raises(FederationError, match=r"diverged in round 1 of 3: .*(slow|fast)-0.*--learning-rate") as raised:
        watched.go_on()
    assert raised.value.exit_code == 1
    assert watched.rounds == []
    assert watched.states == []


@pytest.mark.parametrize("kind", [STEP, FINISH])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e30])
def test_a_device_that_finds_its_own_numbers_broken_ends_the_run_and_is_named(
    splits: SplitMaker, kind: str, factor: float
) -> None:
    def broken(asked: str, message: Message, device: SplitDevice) -> Message:
        if asked == kind and message.header["round"] == 1 and device.session is not None:
            for value in device.session.bottom.values():
                value.data.mul_(factor if math.isfinite(factor) else math.nan)
        return handle(asked, message, device)

    watched = Watched(splits(local_steps=2, rounds=3), {CULPRIT: broken})
    with pytest.raises(
        FederationError, match=rf"diverged in round 2 of 3: the (features|weights|gradient) of {CULPRIT} "
    ):
        watched.go_on()
    assert [state.rounds for state in watched.states] == [1]
    assert all(bool(torch.isfinite(value).all()) for value in watched.states[0].strategy.tensors.values())


def test_all_that_diverge_in_an_exchange_are_named(splits: SplitMaker) -> None:
    def diverging(kind: str, message: Message, device: SplitDevice) -> Message:
        return diverged_message("features") if kind == STEP else handle(kind, message, device)

    watched = Watched(splits(rounds=1), {"slow-00": diverging, "fast-00": diverging})
    with pytest.raises(FederationError, match="the features of slow-00 and fast-00 left"):
        watched.go_on()


def test_a_device_that_says_so_in_other_words_is_refused(splits: SplitMaker) -> None:
    watched = Watched(splits(rounds=1), {CULPRIT: lambda *_: Message({"diverged": "the server"}, {})})
    (record,) = watched.go_on()
    assert lost_of(record) == {CULPRIT: ("refused", "Its figures are malformed at 'diverged'.")}


@pytest.mark.parametrize("evaluate_every", [1, 5])
def test_a_joined_model_without_numbers_ends_the_run_before_it_is_saved(
    splits: SplitMaker, evaluate_every: int
) -> None:
    watched = Watched(splits(rounds=3, evaluate_every=evaluate_every))
    watched.go_on(1)
    end = watched.training.top.end

    def poisoned(weights: Any) -> None:
        end(weights)
        watched.training.top.trained = {name: value * math.nan for name, value in watched.training.top.trained.items()}

    watched.training.top.end = poisoned  # type: ignore[method-assign]
    with pytest.raises(
        FederationError, match=r"diverged in round 2 of 3: its loss on held-out data is nan, after slow-00"
    ):
        watched.go_on()
    assert [state.rounds for state in watched.states] == [1]


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed", "fedavg"])
def test_a_split_run_without_an_accepted_answer_publishes_nothing(
    splits: SplitMaker, strategy: str, tmp_path: Any
) -> None:
    request = splits(strategy=strategy, rounds=2, deadline=1e-6)
    with pytest.raises(FederationError, match=r"any of the 2 rounds \(10 late; .*--deadline"):
        launch(request, OutputOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_whose_every_step_was_dropped_has_learned_nothing(splits: SplitMaker) -> None:
    """With one iteration a round, one device that is lost in it leaves nothing to learn for the others."""
    spoil, _ = FEATURES["NaN"]
    watched = Watched(splits(local_steps=1, rounds=2), {CULPRIT: spoiling(BEGIN, 1, spoil, first_round_only=False)})
    assert [record.accepted for record in watched.go_on()] == [False, False]
