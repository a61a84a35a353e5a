from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_splits import NO_CLIPPING, SplitMaker, Watched, leaves
from sums import digest
from torch import Tensor

from spinecli.data.config import Task
from spinecli.errors import MessageError
from spinecli.federation.config import FeatureDtype
from spinecli.federation.messages import Message
from spinecli.federation.split.device import SplitDevice, handle
from spinecli.federation.split.messages import (
    BEGIN,
    FINISH,
    GRADIENT,
    LOCAL,
    STEP,
    BeginOrder,
    StepOrder,
    bytes_per_token,
    packed,
    unpadded,
)

NAME = "fast-01"
BLOB_OVERHEAD = 400
"""Bytes of a message's header and tensor names, at most."""


class Stopwatch:
    """Notes what is charged."""

    def __init__(self) -> None:
        self.charged: list[tuple[str, float]] = []

    def charge(self, phase: str, flops: float) -> None:
        self.charged.append((phase, flops))

    def seconds(self, phase: str) -> float:
        return 0.0


def device_of(watched: Watched) -> SplitDevice:
    device = watched.device(NAME)
    device.meter = Stopwatch()
    return device


@pytest.fixture
def device(splits: SplitMaker) -> SplitDevice:
    return device_of(Watched(splits()))


def order(**changes: Any) -> dict[str, Any]:
    plain = BeginOrder(
        round=2,
        seed=0,
        steps=3,
        batch_size=4,
        learning_rate=1e-3,
        optimizer="sgd",
        clip_norm=NO_CLIPPING,
        feature_dtype="fp32",
    )
    return {**plain.model_dump(mode="json"), **changes}


def begin(device: SplitDevice, **changes: Any) -> Message:
    bottom = {f"trained.{name}": value for name, value in device.model.bottom_start.items()}
    return handle(BEGIN, Message(order(**changes), bottom), device)


def gradient_of(features: Message, dtype: FeatureDtype = "fp32", seed: int = 0) -> dict[str, Tensor]:
    values = features.tensors["features.values"]
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    return {GRADIENT + name: value for name, value in packed(drawn, dtype).items()}


def step_order(iteration: int, round_number: int = 2) -> dict[str, Any]:
    return dict(StepOrder(round=round_number, iteration=iteration).model_dump(mode="json"))


def test_a_round_is_a_conversation_of_features_and_gradients(device: SplitDevice) -> None:
    """Forward and backward through the bottom are those of autograd, step by step."""
    own = leaves(device.model.bottom_start)
    sent = begin(device)
    for iteration in range(3):
        session = device.session
        assert session is not None
        assert sent.header == {"iteration": iteration}
        features = unpadded(session.features.detach(), session.mask)
        assert torch.equal(sent.tensors["features.values"], features)
        assert sent.tensors["lengths"].tolist() == session.mask.sum(dim=1).tolist()
        before = {name: value.detach().clone() for name, value in session.bottom.items()}
        hidden, mask = session.features, session.mask
        gradient = gradient_of(sent, seed=iteration)
        spread = torch.zeros(hidden.shape)
        spread[mask.bool()] = gradient[f"{GRADIENT}values"]
        expected = torch.autograd.grad(hidden, list(session.bottom.values()), spread, retain_graph=True)
        message = Message(step_order(iteration), gradient)
        if iteration < 2:
            sent = handle(STEP, message, device)
        else:
            answer = handle(FINISH, message, device)
        for (name, value), grad in zip(session.bottom.items(), expected, strict=True):
            torch.testing.assert_close(value.detach(), before[name] - 1e-3 * grad, atol=1e-6, rtol=1e-5)
    assert device.session is None
    assert answer.tensors.keys() == {f"trained.{name}" for name in own}
    assert digest(own) != digest(answer.tensors)


def test_what_came_with_the_message_is_left_as_it_was(device: SplitDevice) -> None:
    """Messages of a simulated fleet may share memory; a device's training must not reach others."""
    bottom = {f"trained.{name}": value.clone() for name, value in device.model.bottom_start.items()}
    before = digest(bottom)
    sent = handle(BEGIN, Message(order(learning_rate=10.0), bottom), device)
    handle(FINISH, Message(step_order(0), gradient_of(sent)), device)
    assert digest(bottom) == before
    assert not any(value.requires_grad for value in device.model.model.parameters() if value.grad is not None)


def test_a_dropped_iteration_trains_nothing(device: SplitDevice) -> None:
    begin(device)
    meter: Any = device.meter
    second = handle(STEP, Message(step_order(0), {}), device)
    assert second.header == {"iteration": 1}
    answer = handle(FINISH, Message(step_order(1), {}), device)
    assert digest(answer.tensors) == digest({f"trained.{k}": v for k, v in device.model.bottom_start.items()})
    assert [phase for phase, _ in meter.charged] == ["forward", "forward"]


def test_work_is_charged_as_it_is_done(device: SplitDevice) -> None:
    sent = begin(device)
    session: Any = device.session
    cost = device.costs.bottom(*session.mask.shape)
    handle(FINISH, Message(step_order(0), gradient_of(sent)), device)
    meter: Any = device.meter
    assert meter.charged == [("forward", cost.forward_flops), ("backward", cost.backward_flops)]
    assert min(cost.forward_flops, cost.backward_flops) > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("task", ["classification", "language"])
def test_only_real_tokens_travel_and_no_token_ids_but_those_to_be_learned(
    splits: SplitMaker, task: Task, dtype: FeatureDtype
) -> None:
    device = device_of(Watched(splits(task=task)))
    sent = begin(device, batch_size=8, feature_dtype=dtype)
    session: Any = device.session
    tokens = int(session.mask.sum())
    assert tokens < session.mask.numel()  # there is padding to leave out
    values = {name for name in sent.tensors if name.startswith("features.")}
    assert sent.tensors.keys() == {"lengths", "labels", *values}
    assert sum(sent.tensors[name].nbytes for name in values) == tokens * bytes_per_token(32, dtype)
    assert len(sent.tensors["labels"]) == (8 if task == "classification" else tokens)
    size = len(sent.pack())
    told = sum(value.nbytes for value in sent.tensors.values())
    assert told < size < told + BLOB_OVERHEAD
    if task == "classification":
        assert set(sent.tensors["labels"].tolist()) <= {0, 1}
        assert told == tokens * bytes_per_token(32, dtype) + 4 * 8 + 4 * 8


def test_the_same_order_gives_the_same_bytes_whatever_came_before(splits: SplitMaker) -> None:
    device = device_of(Watched(splits()))
    first = begin(device).pack()
    handle(STEP, Message(step_order(0), {}), device)
    torch.manual_seed(99)
    assert begin(device).pack() == first  # a round that broke off is begun anew
    assert begin(device, round=3).pack() != first
    assert begin(device, seed=1).pack() != first


def test_out_of_order_messages_are_refused(device: SplitDevice) -> None:
    for kind in (STEP, FINISH):
        with pytest.raises(MessageError, match="not in iteration 0 of round 2"):
            handle(kind, Message(step_order(0), {}), device)
    sent = begin(device)
    for iteration, number in ((1, 2), (0, 1), (0, 3)):
        for kind in (STEP, FINISH):
            with pytest.raises(MessageError, match=f"not in iteration {iteration} of round {number}"):
                handle(kind, Message(step_order(iteration, number), gradient_of(sent)), device)
    handle(STEP, Message(step_order(0), gradient_of(sent)), device)
    with pytest.raises(MessageError, match="not in iteration 0"):
        handle(STEP, Message(step_order(0), gradient_of(sent)), device)
    handle(STEP, Message(step_order(1), {}), device)
    with pytest.raises(MessageError, match="no more than 3"):
        handle(STEP, Message(step_order(2), {}), device)
    begin(device)
    handle(FINISH, Message(step_order(0), {}), device)
    with pytest.raises(MessageError, match="not in iteration"):
        handle(FINISH, Message(step_order(0), {}), device)


def test_an_unknown_request_is_refused(device: SplitDevice) -> None:
    with pytest.raises(MessageError, match="split-dance"):
        handle("split-dance", Message(order(), {}), device)


MALFORMED: dict[str, Any] = {
    "round": -1,
    "seed": "one",
    "steps": 0,
    "batch_size": 0,
    "learning_rate": 0.0,
    "optimizer": "newton",
    "clip_norm": math.nan,
    "feature_dtype": "fp8",
    "surprise": 1,
}


@pytest.mark.parametrize("field", MALFORMED)
@pytest.mark.parametrize("kind", [BEGIN, LOCAL])
def test_malformed_orders_are_refused_by_field(device: SplitDevice, kind: str, field: str) -> None:
    bottom = {f"trained.{name}": value for name, value in device.model.bottom_start.items()}
    with pytest.raises(MessageError, match=field):
        handle(kind, Message(order(**{field: MALFORMED[field]}), bottom), device)
    if field != "surprise":
        header = order()
        del header[field]
        with pytest.raises(MessageError, match=field):
            handle(kind, Message(header, bottom), device)
    assert device.session is None


@pytest.mark.parametrize(
    "header", [{}, {"round": 2}, {"round": 2, "iteration": -1}, {"round": 2, "iteration": 0, "x": 1}]
)
@pytest.mark.parametrize("kind", [STEP, FINISH])
def test_malformed_steps_are_refused(device: SplitDevice, kind: str, header: dict[str, Any]) -> None:
    begin(device)
    with pytest.raises(MessageError, match="malformed"):
        handle(kind, Message(header, {}), device)


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "NaN"])
@pytest.mark.parametrize("kind", [BEGIN, LOCAL])
def test_a_model_that_does_not_fit_is_refused(device: SplitDevice, kind: str, wrong: str) -> None:
    model = device.model
    start = {**model.bottom_start, **(model.top_start if kind == LOCAL else {})}
    tensors = {f"trained.{name}": value.clone() for name, value in start.items()}
    first = min(tensors)
    if wrong == "missing":
        del tensors[first]
    elif wrong == "extra":
        tensors["trained.more"] = torch.zeros(1)
    elif wrong == "shape":
        tensors[first] = tensors[first][1:]
    else:
        tensors[first][0] = math.nan
    with pytest.raises(MessageError, match={"shape": "has shape", "extra": "not asked for"}.get(wrong, wrong)):
        handle(kind, Message(order(), tensors), device)


def test_gradients_that_do_not_fit_are_refused_and_the_right_ones_still_taken(device: SplitDevice) -> None:
    sent = begin(device)
    right = gradient_of(sent)
    values = right[f"{GRADIENT}values"]
    wrong: list[dict[str, Tensor]] = [
        {f"{GRADIENT}values": values[1:]},
        {f"{GRADIENT}values": values[:, 1:]},
        {f"{GRADIENT}values": values.half()},
        {f"{GRADIENT}values": values * math.nan},
        {f"{GRADIENT}scales": values[:, 0]},
    ]
    for tensors in wrong:
        for kind in (STEP, FINISH):
            with pytest.raises(MessageError):
                handle(kind, Message(step_order(0), tensors), device)
    handle(FINISH, Message(step_order(0), right), device)


def test_the_unsplit_reference_reports_its_loss_at_both_ends(splits: SplitMaker) -> None:
    device = device_of(Watched(splits(strategy="fedavg")))
    start = {**device.model.bottom_start, **device.model.top_start}
    message = Message(order(steps=12), {f"trained.{name}": value for name, value in start.items()})
    answer = handle(LOCAL, message, device)
    assert answer.header["examples"] == len(device.indices)
    assert float(str(answer.header["loss_after"])) < float(str(answer.header["loss_before"]))
    meter: Any = device.meter
    assert [phase for phase, _ in meter.charged] == ["forward", "backward"] * 12
    assert digest(answer.tensors) == digest(handle(LOCAL, message, device).tensors)
