from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from spinecli.errors import MessageError
from spinecli.federation.messages import Message, require_finite, require_shapes

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.int8, torch.uint8]
LEAVES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HEADERS: Any = st.dictionaries(st.text(max_size=8), JSON, max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return (torch.randn(shape, generator=generator) * 50).clamp(0, 100).to(dtype)


NAMED = st.dictionaries(
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1), tensors(), max_size=4
)


def equal(one: Message, other: Message) -> bool:
    return (
        one.header == other.header
        and one.tensors.keys() == other.tensors.keys()
        and all(
            value.dtype == other.tensors[name].dtype
            and value.shape == other.tensors[name].shape
            and torch.equal(value, other.tensors[name])
            for name, value in one.tensors.items()
        )
    )


@given(HEADERS, NAMED)
def test_what_is_packed_is_what_is_unpacked(header: Any, named: dict[str, Tensor]) -> None:
    message = Message(header, named)
    assert equal(Message.unpack(message.pack()), message)


@given(HEADERS, NAMED, st.randoms(use_true_random=False))
def test_equal_messages_have_equal_bytes(header: Any, named: dict[str, Tensor], order: Any) -> None:
    keys, names = list(header), list(named)
    order.shuffle(keys)
    order.shuffle(names)
    shuffled = Message({key: header[key] for key in keys}, {name: named[name].clone() for name in names})
    blob = shuffled.pack()
    assert blob == Message(header, named).pack()
    assert Message.unpack(blob).pack() == blob


def test_views_travel_as_what_they_show() -> None:
    whole = torch.arange(24.0).view(4, 6)
    message = Message(
        {}, {"transposed": whole.T, "cut": whole[1:3, ::2], "one": whole[0], "grown": whole[:1].expand(3, 6)}
    )
    assert equal(Message.unpack(message.pack()), message)


def test_tensors_that_share_memory_travel_apart() -> None:
    value = torch.ones(3)
    message = Message({}, {"a": value, "b": value})
    assert equal(Message.unpack(message.pack()), message)


PACKED = Message(
    {"round": 3, "seed": 0, "names": ["a", "b"]},
    {
        "x": torch.arange(6.0).view(2, 3),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(2, dtype=torch.bfloat16),
    },
).pack()
PLACES = st.integers(0, len(PACKED) - 1)


@settings(max_examples=400)
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_make_another_message(changes: list[tuple[int, int]]) -> None:
    blob = bytearray(PACKED)
    for place, value in changes:
        blob[place] = value
    try:
        message = Message.unpack(bytes(blob))
    except MessageError:
        return
    assert isinstance(message.header, dict)
    assert all(isinstance(value, Tensor) for value in message.tensors.values())


@given(PLACES)
def test_a_cut_message_is_refused(length: int) -> None:
    with pytest.raises(MessageError):
        Message.unpack(PACKED[:length])


@given(st.binary(max_size=200))
def test_garbage_is_refused(blob: bytes) -> None:
    with pytest.raises(MessageError):
        Message.unpack(blob)


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def described(**entry: Any) -> bytes:
    outer = {"__metadata__": {"spine": "{}"}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}
    return framed(json.dumps(outer).encode(), bytes(4))


FOREIGN = {
    "no spine message": save({"x": torch.ones(1)}),
    "a header that is a list": save({}, metadata={"spine": "[]"}),
    "a header that is no JSON": save({}, metadata={"spine": "{"}),
    "a header nested without end": save({}, metadata={"spine": "[" * 100_000}),
    "a number of 10,000 digits": save({}, metadata={"spine": '{"a": ' + "9" * 10_000 + "}"}),
    "a header length of 2^63": struct.pack("<Q", 2**63) + PACKED[8:],
    "bytes of nothing": b"",
    "a pickle": b"\x80\x04\x95" + bytes(40),
    "bytes behind the end": PACKED + b"more",
    "a dtype that there is not": described(dtype="F3"),
    "a dtype that torch has not": described(dtype="F4", shape=[8]),
    "a negative size": described(shape=[-1]),
    "a huge size": described(shape=[2**62, 4]),
    "another shape than its bytes": described(shape=[2]),
    "offsets that climb out": described(data_offsets=[0, 400]),
    "offsets that overlap the header": described(data_offsets=[-4, 0]),
}


@pytest.mark.parametrize("blob", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_blobs_are_refused(blob: bytes) -> None:
    with pytest.raises(MessageError, match=r"^A message.*\.$"):
        Message.unpack(blob)


def test_values_that_are_no_numbers_are_named() -> None:
    good = {"a": torch.ones(2), "flags": torch.tensor([True]), "count": torch.tensor(3)}
    require_finite(good)
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(MessageError, match=r"layers\.0 holds"):
            require_finite({**good, "layers.0": torch.tensor([1.0, value], dtype=torch.bfloat16)})


def test_names_and_shapes_that_were_not_asked_for_are_named() -> None:
    given_tensors = {"a": torch.ones(2, 3), "b": torch.ones(1)}
    require_shapes(given_tensors, {"a": (2, 3), "b": (1,)})
    with pytest.raises(MessageError, match="b was not asked for"):
        require_shapes(given_tensors, {"a": (2, 3)})
    with pytest.raises(MessageError, match="c is missing"):
        require_shapes(given_tensors, {"a": (2, 3), "b": (1,), "c": ()})
    with pytest.raises(MessageError, match=r"a has shape \[2, 3\], not \[3, 2\]"):
        require_shapes(given_tensors, {"a": (3, 2), "b": (1,)})
