"""The door of a device: one message in, one message out. The same function runs behind every engine."""

from __future__ import annotations

from spinecli.errors import MessageError
from spinecli.federation.client.device import Device, TrainingOrder
from spinecli.federation.client.training import train
from spinecli.federation.messages import Message, checked_header, require_finite

TRAIN = "train"


def handle(kind: str, message: Message, device: Device) -> Message:
    """Do what a message asks for.

    Raises: MessageError if the message is not one that a device knows, or holds numbers that are none.
    """
    if kind != TRAIN:
        raise MessageError(f"A device knows no request {kind!r}.")
    require_finite(message.tensors)
    order = checked_header(TrainingOrder, message, "The order to train is")
    trained = train(order, message.tensors, device)
    return Message(trained.metrics, trained.tensors)
