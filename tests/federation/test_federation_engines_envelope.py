from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.errors import MessageError
from spinecli.federation.bounds import CLASS_NAME
from spinecli.federation.engines.envelope import (
    Answer,
    Empty,
    Hello,
    JobHeader,
    Ready,
    ServerNotice,
    decode_envelope,
    encode_envelope,
    explained,
)
from spinecli.federation.simulation.conditions import Conditions

numbers = st.floats(min_value=1e-9, max_value=1e18)
conditions = st.builds(
    Conditions, numbers, numbers, numbers, numbers, numbers, st.none() | st.floats(min_value=0, max_value=0.999)
)
headers = st.one_of(
    st.builds(JobHeader, job=st.integers(0, 2**40), run=st.text(), kind=st.text(), conditions=st.none() | conditions),
    st.builds(Answer, job=st.integers(0, 2**40), seconds=st.floats(0, 1e9)),
    st.builds(
        Ready,
        device_class=st.from_regex(CLASS_NAME, fullmatch=True),
        memory_bytes=st.integers(0, 2**50),
        examples=st.integers(1, 2**40),
        label_counts=st.lists(st.integers(0, 99)).map(tuple),
    ),
    st.just(Empty()),
)


@given(headers, st.binary())
def test_what_is_sealed_is_opened_again(header: JobHeader, carried: bytes) -> None:
    found, rest = decode_envelope(type(header), encode_envelope(header, carried))
    assert found == header
    assert rest == carried


@given(headers, st.integers(min_value=0, max_value=400))
def test_a_cut_header_is_refused(header: JobHeader, length: int) -> None:
    whole = encode_envelope(header)
    if length < len(whole):
        with pytest.raises(MessageError):
            decode_envelope(type(header), whole[:length])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_refused(blob: bytes) -> None:
    found = None
    with suppress(MessageError):
        found = decode_envelope(Answer, blob)
    assert found is None or isinstance(found[0], Answer)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Answer, '{"job": 1, "seconds": -1}'),
        (Answer, '{"job": 1, "seconds": NaN}'),
        (Answer, '{"job": 1, "seconds": 1, "more": 2}'),
        (Ready, '{"device_class": "a", "memory_bytes": 1, "examples": 0}'),
        (Ready, '{"device_class": "", "memory_bytes": 1, "examples": 1}'),
        (Ready, '{"device_class": "/a", "memory_bytes": 1, "examples": 1}'),
        (Ready, '{"device_class": "..", "memory_bytes": 1, "examples": 1}'),
        (Ready, '{"device_class": "a/../../b", "memory_bytes": 1, "examples": 1}'),
        (Ready, '{"device_class": "a\\n", "memory_bytes": 1, "examples": 1}'),
        (Answer, '{"job": 1, "seconds": 1e308}'),
        (Hello, '{"version": "' + "1" * 200 + '"}'),
        (ServerNotice, '{"explanation": "' + "a" * 2000 + '"}'),
        (Empty, '{"surprise": 1}'),
        (Empty, "[]"),
    ],
)
def test_headers_with_anything_unexpected_are_refused(kind: type[Answer], text: str) -> None:
    with pytest.raises(MessageError):
        decode_envelope(kind, len(text).to_bytes(4, "big") + text.encode())


@given(st.text())
def test_an_explanation_is_one_short_line(text: str) -> None:
    told = explained(text)
    assert len(told) <= 1000
    assert "\n" not in told
    assert decode_envelope(ServerNotice, encode_envelope(ServerNotice(explanation=told)))[0].explanation == told
