"""The door of a device: one message in, one message out. The same function runs behind every engine."""

from __future__ import annotations

from pydantic import ValidationError

from spinecli.errors import MessageError
from spinecli.federation.device.device import Device
from spinecli.federation.device.order import TrainingOrder
from spinecli.federation.device.training import train
from spinecli.federation.messages import Message, require_finite

TRAIN = "train"


def handle(kind: str, message: Message, device: Device) -> Message:
    """Do what a message asks for.

    Raises: MessageError if the message is not one that a device knows, or holds numbers that are none.
    """
    if kind != TRAIN:
        raise MessageError(f"A device knows no request {kind!r}.")
    require_finite(message.tensors)
    try:
        order = TrainingOrder.model_validate(message.header)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise MessageError(f"The order to train is malformed at {field!r}.") from error
    trained = train(order, message.tensors, device)
    return Message(trained.metrics, trained.tensors)
