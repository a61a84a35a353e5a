"""Who takes part: what the server hears of each device, and what it answers at once.

Everything here is called under one lock, which the engine shares: NVFlare's threads bring what is heard, and the
engine's own thread looks at what has become of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Condition

from spinecli import __version__
from spinecli.errors import MessageError
from spinecli.federation.engine import Node
from spinecli.federation.engines.envelope import (
    ACCEPTED,
    ALIVE,
    ANSWER,
    FAILED,
    HELLO,
    LEAVE,
    READY,
    UNREADY,
    WELCOME,
    Accepted,
    Answer,
    Failed,
    Hello,
    Ready,
    ServerNotice,
    Welcome,
    decode_envelope,
    encode_envelope,
)
from spinecli.federation.engines.nvflare.names import device_of
from spinecli.federation.engines.pending_request import PendingRequest

_LOG = logging.getLogger("nvflare.spine")

Send = Callable[[str, str, bytes], bool]
"""Hands an envelope on a topic to a cell; False if that is not connected."""


@dataclass(frozen=True)
class Timeouts:
    """How long the server waits for devices that it does not hear of, in seconds."""

    gone: float = 15.0
    """After a connection has broken, for the same process to come back."""
    silent: float = 60.0
    """While a connection stands, for a sign of life; devices give one every few seconds."""


@dataclass(eq=False)
class Member:
    """A device, by its newest process."""

    cell: str
    heard: float
    """When it last was heard of; monotonic."""
    node: Node | None = None
    ready: bool = False
    left: float | None = None
    """When its connection broke; None while it stands."""
    trouble: str = ""
    """Why it cannot take part."""


@dataclass(eq=False)
class Members:
    """All devices that have come.

    Args:
        names: who is expected; others are sent away.
        run_config: what devices are told.
        server: name of the server's process.
        requests: jobs that are on their way, by number.
        changed: notified of every change.
        send: how to reach them.
    """

    names: frozenset[str]
    run_config: bytes
    server: str
    requests: Mapping[int, PendingRequest]
    changed: Condition
    send: Send
    known: dict[str, Member] = field(default_factory=dict)

    def receive(self, cell: str, topic: str, envelope: bytes) -> None:
        """Take note of what a process says; nonsense is logged and changes nothing."""
        with self.changed:
            try:
                self._note(cell, topic, envelope)
            except MessageError as error:
                _LOG.warning("refused what %s says on topic %r: %s", cell, topic, error)
            self.changed.notify_all()

    def gone(self, cell: str) -> None:
        """A connection has broken."""
        with self.changed:
            member = self.known.get(device_of(cell))
            if member is not None and member.cell == cell and member.left is None:
                member.left = time.monotonic()
            self.changed.notify_all()

    def _note(self, cell: str, topic: str, envelope: bytes) -> None:
        if topic == HELLO:
            self._welcome(cell, decode_envelope(Hello, envelope)[0])
            return
        member = self.known.get(device_of(cell))
        if member is None or member.cell != cell:
            return
        member.heard, member.left = time.monotonic(), None
        if topic == READY:
            facts = decode_envelope(Ready, envelope)[0]
            member.node = Node(device_of(cell), **facts.model_dump())
            member.ready, member.trouble = True, ""
        elif topic == UNREADY:
            member.ready, member.trouble = False, decode_envelope(ServerNotice, envelope)[0].explanation
        elif topic == ACCEPTED:
            if pending := self._pending(cell, decode_envelope(Accepted, envelope)[0].job):
                pending.accepted = member.heard
        elif topic == ANSWER:
            answer, carried = decode_envelope(Answer, envelope)
            if pending := self._pending(cell, answer.job):
                pending.arrived, pending.seconds, pending.answer = member.heard, answer.seconds, carried
        elif topic == FAILED:
            failed = decode_envelope(Failed, envelope)[0]
            if pending := self._pending(cell, failed.job):
                pending.fail(member.heard, failed.explanation)
        elif topic != ALIVE:
            raise MessageError("the topic is unknown")

    def _pending(self, cell: str, number: int) -> PendingRequest | None:
        """The open pending of this number, if this process has it; answers to anything else come too late."""
        pending = self.requests.get(number)
        return pending if pending is not None and pending.cell == cell and pending.open else None

    def _welcome(self, cell: str, hello: Hello) -> None:
        name = device_of(cell)
        member = self.known.get(name)
        if hello.version != __version__:
            self._dismiss(cell, f"the server has spine {__version__}, this device {hello.version}; install the same")
            return
        if name not in self.names:
            self._dismiss(cell, f"the run does not expect a device {name}")
            return
        if member is not None and member.cell != cell:
            self._dismiss(member.cell, f"another process has taken the name {name}")
        if member is None or member.cell != cell:
            _LOG.info("%s has come as %s", name, cell)
            self.known[name] = member = Member(cell, time.monotonic(), member.node if member else None)
        member.heard, member.left = time.monotonic(), None
        for pending in self.requests.values():
            if pending.cell == cell and pending.open and hello.job != pending.number:
                pending.cell = ""  # lost with the old connection, so it is sent again
        self.send(cell, WELCOME, encode_envelope(Welcome(server=self.server), self.run_config))

    def _dismiss(self, cell: str, explanation: str) -> None:
        _LOG.info("%s is told to leave: %s", cell, explanation)
        self.send(cell, LEAVE, encode_envelope(ServerNotice(explanation=explanation)))
