"""What a device does in a split round: bottoms forward, waits for its gradients, and takes a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from spinecli.artifacts.seeding import torch_generator
from spinecli.data.batches import Batch, batches, collate
from spinecli.data.encoding import Encoded
from spinecli.errors import MessageError
from spinecli.federation.client.device import DeviceMemory, Meter
from spinecli.federation.client.training import loss_at_ends
from spinecli.federation.messages import (
    Message,
    checked_header,
    require_finite,
    require_moderate,
    require_shapes,
)
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.messages import (
    BEGIN,
    FEATURES,
    FINISH,
    GRADIENT,
    LOCAL,
    PAYLOAD,
    PROBE,
    STEP,
    TRAINED,
    BeginOrder,
    Diverging,
    ProbeOrder,
    StepOrder,
    diverged_message,
    packed,
    unpacked,
    unpadded,
)
from spinecli.federation.split.model import SplitModel, optimizer_of
from spinecli.lora.cost import StepCost

_ORDER = "The order is"


@dataclass(eq=False)
class DeviceSession:
    """A device in the middle of a round."""

    order: BeginOrder
    bottom: dict[str, Tensor]
    """Trained tensors, leaves of the graph."""
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    iteration: int = -1
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    """(rows, length, d_model), with the graph that waits for gradients."""
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    cost: StepCost = field(default_factory=lambda: StepCost(0, 0))


@dataclass(eq=False)
class SplitDevice:
    """Everything that a device's half of the work needs."""

    name: str
    model: SplitModel
    costs: SplitCosts
    data: Encoded
    indices: Sequence[int]
    """The examples that are this device's own."""
    memory: DeviceMemory
    meter: Meter
    session: DeviceSession | None = None

    def abandon(self) -> None:
        """Drop its half of the model, the moments, and the graph of the last features."""
        self.session = None


class _DivergedError(Exception):
    """The device's own numbers have left the finite range."""

    def __init__(self, what: Diverging) -> None:
        super().__init__(what)
        self.what: Diverging = what


def handle(kind: str, message: Message, device: SplitDevice) -> Message:
    """Do what a message asks for; where the device's own numbers diverge on the way, the answer says that instead.

    Raises: MessageError if the message is not one that a device knows, does not fit its round, or holds numbers that
        are none.
    """
    require_finite(message.tensors)
    try:
        return _answer(kind, message, device)
    except _DivergedError as error:
        device.session = None
        return diverged_message(error.what)


def _answer(kind: str, message: Message, device: SplitDevice) -> Message:
    if kind == BEGIN:
        return _begin(message, device)
    if kind == STEP:
        return _step(message, device)
    if kind == FINISH:
        return _finish(message, device)
    if kind == LOCAL:
        return _train_locally(message, device)
    if kind == PROBE:
        return _probe(message, device)
    raise MessageError(f"A device knows no request {kind!r}.")


def _begin(message: Message, device: SplitDevice) -> Message:
    """Take over the bottom and send the first features."""
    order = checked_header(BeginOrder, message, _ORDER)
    device.session = _open(order, message, device, device.model.bottom_names)
    return _forward(device, device.session)


def _step(message: Message, device: SplitDevice) -> Message:
    """Take a step along the gradients, if there are any, and send the next features."""
    session = _session(message, device)
    _backward(message, device, session)
    return _forward(device, session)


def _finish(message: Message, device: SplitDevice) -> Message:
    """Take the last step and give the bottom back."""
    session = _session(message, device)
    _backward(message, device, session)
    device.session = None
    return Message({}, {TRAINED + name: value.detach() for name, value in session.bottom.items()})


def _probe(message: Message, device: SplitDevice) -> Message:
    """Rows forward and backward through the bottom as the checkpoint has it; nothing is learned and nothing told."""
    order = checked_header(ProbeOrder, message, _ORDER)
    require_shapes(message.tensors, {PAYLOAD: tuple(message.tensors.get(PAYLOAD, torch.empty(0)).shape)})
    own = device.data.rows_of(device.indices)
    batch = collate(device.data, [own[number % len(own)] for number in range(order.rows)])
    bottom = {name: value.clone().requires_grad_(True) for name, value in device.model.bottom_start.items()}
    device.model.features(bottom, batch).sum().backward()  # type: ignore[no-untyped-call]
    cost = device.costs.bottom(*batch.input_ids.shape)
    device.meter.charge("forward", cost.forward_flops)
    device.meter.charge("backward", cost.backward_flops)
    return Message({}, {PAYLOAD: torch.zeros_like(message.tensors[PAYLOAD])})


def _train_locally(message: Message, device: SplitDevice) -> Message:
    """All steps of the round on the whole model, without a server in between."""
    order, model = checked_header(BeginOrder, message, _ORDER), device.model
    session = _open(order, message, device, (*model.bottom_names, *model.top_names))
    losses = []
    for batch in session.batches:
        loss = functional.cross_entropy(*model.joined_answers(session.bottom, batch))
        _require_sound("loss", {"loss": loss.detach()})
        loss.backward()  # type: ignore[no-untyped-call]
        _descend(session)
        cost = device.costs.whole(*batch.input_ids.shape)
        device.meter.charge("forward", cost.forward_flops)
        device.meter.charge("backward", cost.backward_flops)
        losses.append(float(loss.detach()))
    before, after = loss_at_ends(losses)
    figures: dict[str, JsonValue] = {"examples": len(device.indices), "loss_before": before, "loss_after": after}
    return Message(figures, {TRAINED + name: value.detach() for name, value in session.bottom.items()})


def _open(order: BeginOrder, message: Message, device: SplitDevice, names: Sequence[str]) -> DeviceSession:
    start = {**device.model.bottom_start, **device.model.top_start}
    received = {name.removeprefix(TRAINED): value for name, value in message.tensors.items()}
    require_shapes(received, {name: tuple(start[name].shape) for name in names})
    place = device.model.compute.device
    # in a fixed order, which that of a message is not: the norm of all gradients is a sum, and sums depend on it
    trained = {name: received[name].to(place, torch.float32, copy=True).requires_grad_(True) for name in names}
    generator = torch_generator(order.seed, "batches", device.name, order.round)
    return DeviceSession(
        order,
        trained,
        optimizer_of(order.optimizer, list(trained.values()), order.learning_rate),
        batches(device.data, device.indices, order.batch_size, order.steps, generator),
    )


def _forward(device: SplitDevice, session: DeviceSession) -> Message:
    batch = next(session.batches, None)
    if batch is None:
        raise MessageError(f"Round {session.order.round} has no more than {session.order.steps} iterations.")
    session.iteration += 1
    session.features = device.model.features(session.bottom, batch)
    session.mask = batch.attention_mask
    own = unpadded(session.features.detach(), session.mask)
    _require_sound("features", {"features": own})
    session.cost = device.costs.bottom(*batch.input_ids.shape)
    device.meter.charge("forward", session.cost.forward_flops)
    labels = batch.labels
    if device.model.task == "language":
        labels = unpadded(labels, batch.attention_mask)
    sent = packed(own, session.order.feature_dtype)
    tensors = {
        "lengths": session.mask.sum(dim=1).to(torch.int32),
        "labels": labels.to(torch.int32),
        **{FEATURES + name: value for name, value in sent.items()},
    }
    return Message({"iteration": session.iteration}, tensors)


def _backward(message: Message, device: SplitDevice, session: DeviceSession) -> None:
    own = {name.removeprefix(GRADIENT): value for name, value in message.tensors.items() if name.startswith(GRADIENT)}
    mask, gradients = session.mask, None
    if own:
        gradients = unpacked(own, int(mask.sum()), device.model.d_model, session.order.feature_dtype)
    features, session.features = session.features, torch.empty(0)
    if gradients is None:
        return
    spread = torch.zeros(*mask.shape, device.model.d_model)
    spread[mask.bool()] = gradients
    features.backward(spread.to(features))  # type: ignore[no-untyped-call]
    _descend(session)
    device.meter.charge("backward", session.cost.backward_flops)


def _descend(session: DeviceSession) -> None:
    norm = nn.utils.clip_grad_norm_(list(session.bottom.values()), session.order.clip_norm)
    if not bool(torch.isfinite(norm)):
        raise _DivergedError("gradient")
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    _require_sound("weights", session.bottom)


def _require_sound(what: Diverging, values: Mapping[str, Tensor]) -> None:
    """Raise _DivergedError unless the values are numbers that the server would take."""
    try:
        require_moderate({name: value.detach().float() for name, value in values.items()})
    except MessageError as error:
        raise _DivergedError(what) from error


def _session(message: Message, device: SplitDevice) -> DeviceSession:
    order = checked_header(StepOrder, message, _ORDER)
    session = device.session
    if session is None or session.order.round != order.round or session.iteration != order.iteration:
        raise MessageError(f"{device.name} is not in iteration {order.iteration} of round {order.round}.")
    return session
