"""What travels between server and device: one safetensors blob with a JSON header, the same bytes on every engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from pydantic import BaseModel, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from spinecli.errors import MessageError
from spinecli.federation.bounds import LARGEST

_HEADER_KEY = "spine"
_LENGTH_BYTES = 8
_NOT_FINITE = "holds NaN or infinite values"
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


@dataclass(frozen=True, eq=False)
class Message:
    """A JSON header and named tensors."""

    header: dict[str, JsonValue]
    tensors: Mapping[str, Tensor]

    def pack(self) -> bytes:
        """The message as bytes; equal messages have equal bytes."""
        copies = {
            # copied, since safetensors refuses tensors that share memory
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in sorted(self.tensors.items())
        }
        return bytes(save_tensors(copies, metadata={_HEADER_KEY: json.dumps(self.header, sort_keys=True)}))

    @classmethod
    def unpack(cls, blob: bytes) -> Message:
        """Read a blob from someone else; nothing in it is executed. Raises MessageError if it is malformed."""
        try:
            # safetensors gives them in no order, and sums over them must not depend on that
            tensors = dict(sorted(load_tensors(blob).items()))
            length = int.from_bytes(blob[:_LENGTH_BYTES], "little")
            outer = json.loads(blob[_LENGTH_BYTES : _LENGTH_BYTES + length])
            header = json.loads(outer["__metadata__"][_HEADER_KEY])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MessageError("A message is truncated or is not a spine message.") from error
        if not isinstance(header, dict):
            raise MessageError("A message's header is not a JSON object.")
        return cls(header, tensors)


Header = TypeVar("Header", bound=BaseModel)


def checked_header(kind: type[Header], message: Message, what: str) -> Header:
    """A message's header as a `kind`; MessageError, beginning with `what`, that names the first malformed field."""
    try:
        return kind.model_validate(message.header)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        wrong = "not finite" if first["type"] == "finite_number" else "malformed"
        raise MessageError(f"{what} {wrong} at {field!r}.") from error


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise MessageError naming the first tensor that holds NaN or infinity, or a kind of number that none sends."""
    for name, value in tensors.items():
        _require_carried(name, value)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise MessageError(f"{name} {_NOT_FINITE}.")


def require_moderate(tensors: Mapping[str, Tensor]) -> None:
    """Raise MessageError naming the first tensor that is not float32 or holds what is no number up to `LARGEST`."""
    for name, value in tensors.items():
        _require_carried(name, value)
        if value.dtype is not torch.float32:
            raise MessageError(f"{name} is {value.dtype}, not float32.")
        largest = float(torch.stack(torch.aminmax(value)).abs().max()) if value.numel() else 0.0
        if not math.isfinite(largest):
            raise MessageError(f"{name} {_NOT_FINITE}.")
        if largest > LARGEST:
            raise MessageError(f"{name} holds numbers beyond {LARGEST:g}.")


def _require_carried(name: str, value: Tensor) -> None:
    if value.dtype not in _DTYPES:
        raise MessageError(f"{name} is {value.dtype}, which no message carries.")


def require_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise MessageError if names or shapes differ from what was asked for."""
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise MessageError(f"{name} {'was not asked for' if name in tensors else 'is missing'}.")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise MessageError(f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}.")
