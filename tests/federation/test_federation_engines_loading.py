"""What an engine does with a round while its devices load, without processes or a network."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("nvflare")

from spinecli import __version__
from spinecli.errors import FederationError
from spinecli.federation.engine import Job, Lost
from spinecli.federation.engines.envelope import (
    FAILED,
    HELLO,
    JOB,
    READY,
    UNREADY,
    Failed,
    Hello,
    JobHeader,
    Ready,
    ServerNotice,
    decode_envelope,
    encode_envelope,
)
from spinecli.federation.engines.nvflare import engine as module
from spinecli.federation.engines.nvflare.connection import Address
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.messages import Message

IS_READY = encode_envelope(Ready(device_class="board", memory_bytes=1, examples=3))


class Wire:
    """Takes note of the jobs that go out, and has every device say that it failed."""

    def __init__(self, name: str, address: Any, identity: Any, receive: Any, *rest: Any) -> None:
        self.receive = receive
        self.sent: list[str] = []

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def send(self, cell: str, topic: str, envelope: bytes) -> bool:
        if topic == JOB:
            self.sent.append(cell)
            number = decode_envelope(JobHeader, envelope)[0].job
            self.later(cell, FAILED, encode_envelope(Failed(job=number, explanation="it was only asked")))
        return True

    def later(self, cell: str, topic: str, envelope: bytes, seconds: float = 0.05) -> None:
        threading.Timer(seconds, self.receive, (cell, topic, envelope)).start()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[NvflareEngine]:
    monkeypatch.setattr(module, "Connection", Wire)
    monkeypatch.setattr(Address, "require_free", lambda self: None)
    made = NvflareEngine(["a", "b"], b"", Address("127.0.0.1", 1), None)
    for name in "ab":
        come(made, f"{name}.1")
        wire_of(made).receive(f"{name}.1", READY, IS_READY)
    made.wait_for_all(lambda status: None)
    yield made
    made.close()


def wire_of(engine: NvflareEngine) -> Wire:
    wire: Any = engine._line
    return wire  # type: ignore[no-any-return]


def come(engine: NvflareEngine, cell: str) -> None:
    wire_of(engine).receive(cell, HELLO, encode_envelope(Hello(version=__version__)))


def asked(engine: NvflareEngine) -> list[str]:
    jobs = [Job(name, "train", 0, Message({}, {})) for name in "ab"]
    return [lost.explanation for lost in engine.exchange(jobs, 30.0) if isinstance(lost, Lost)]


def test_who_is_still_loading_does_not_hold_up_the_others(engine: NvflareEngine) -> None:
    come(engine, "a.2")
    first, second = asked(engine)
    assert "loading" in first
    assert second == "it was only asked"
    assert wire_of(engine).sent == ["b.1"]


def test_while_all_are_loading_a_round_waits_for_the_first(engine: NvflareEngine) -> None:
    for name in "ab":
        come(engine, f"{name}.2")
    wire_of(engine).later("a.2", READY, IS_READY, 0.6)
    explanations = asked(engine)
    assert wire_of(engine).sent == ["a.2"]
    assert explanations[0] == "it was only asked"
    assert "loading" in explanations[1]


def test_who_could_not_load_is_asked_again(engine: NvflareEngine) -> None:
    wire_of(engine).receive("a.1", UNREADY, encode_envelope(ServerNotice(explanation="killed while loading")))
    assert asked(engine) == ["it was only asked"] * 2
    assert sorted(wire_of(engine).sent) == ["a.1", "b.1"]


def test_with_nobody_left_who_can_take_part_the_run_ends(engine: NvflareEngine) -> None:
    for name in "ab":
        come(engine, f"{name}.2")
        wire_of(engine).receive(
            f"{name}.2", UNREADY, encode_envelope(ServerNotice(explanation=f"no memory on {name}."))
        )
    with pytest.raises(FederationError, match=r"--resume.*no memory on a\. no memory on b\."):
        asked(engine)
    assert sorted(wire_of(engine).sent) == ["a.2", "b.2"], "each was given the chance to load anew"
