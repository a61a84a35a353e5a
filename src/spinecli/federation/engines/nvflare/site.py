"""A device's long-lived process: it keeps the connection and a training process, and lets jobs through to that."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence

from spinecli import __version__
from spinecli.errors import MessageError
from spinecli.federation.engines.envelope import (
    ACCEPTED,
    ALIVE,
    ANSWER,
    FAILED,
    HELLO,
    JOB,
    LEAVE,
    READY,
    UNREADY,
    WELCOME,
    Accepted,
    Answer,
    Empty,
    Failed,
    Hello,
    JobHeader,
    ServerNotice,
    Welcome,
    decode_envelope,
    encode_envelope,
    explained,
)
from spinecli.federation.engines.nvflare.certificates import Identity
from spinecli.federation.engines.nvflare.child import Child
from spinecli.federation.engines.nvflare.connection import Address, Connection
from spinecli.federation.engines.nvflare.events import CONNECTED, DIED, GONE, STOP, TRAINING, Event, ReceivedWork
from spinecli.federation.engines.nvflare.names import SERVER, cell_name

_LOG = logging.getLogger("nvflare.spine")
_ALIVE_SECONDS = 5.0
_HELLO_SECONDS = 2.0
_UNCONNECTED_SECONDS = 20.0
STOPPED = "it was stopped"


class Site:
    """One device's process.

    Args:
        device: its name.
        command: starts a training process.
        setup: what that is told beside the server's run_config; opaque here.
        note: told in a line what changes.
    """

    def __init__(
        self,
        device: str,
        address: Address,
        identity: Identity | None,
        command: Sequence[str],
        setup: bytes,
        note: Callable[[str], None] = _LOG.info,
    ) -> None:
        self._note = note
        self._command = command
        self._setup = setup
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._line = Connection(cell_name(device), address, identity, self._receive, self._hear_of, self._miss)
        self._server = ""
        self._run_config: bytes | None = None
        self._child: Child | None = None
        self._loaded = False
        self._ready = b""
        self._trouble = ""
        self._current: ReceivedWork | None = None
        self._waiting: ReceivedWork | None = None
        self._newest: int | None = None
        self._last: tuple[str, bytes] | None = None
        self._welcome = False
        self._connected = False

    def stop(self) -> None:
        """Make `run` return; may be called from anywhere."""
        self._events.put(Event(STOP, envelope=encode_envelope(ServerNotice(explanation=STOPPED))))

    def run(self) -> str:
        """Serve until told to leave; returns why."""
        self._line.open()
        began, hinted = time.monotonic(), False
        alive = hello = 0.0
        try:
            while True:
                try:
                    event = self._events.get(timeout=1.0)
                except queue.Empty:
                    event = None
                if event is not None and event.what == STOP:
                    return decode_envelope(ServerNotice, event.envelope)[0].explanation
                if event is not None:
                    self._take(event)
                now = time.monotonic()
                if not hinted and not self._server and now - began > _UNCONNECTED_SECONDS:
                    hinted = True
                    self._note("not connected yet: the server is not there, or does not accept this certificate")
                if self._connected and not self._welcome and now - hello > _HELLO_SECONDS:
                    hello = now
                    self._tell(HELLO, encode_envelope(Hello(version=__version__, job=self._newest)))
                if self._welcome and now - alive > _ALIVE_SECONDS:
                    alive = now
                    self._tell(ALIVE, encode_envelope(Empty()))
        finally:
            self._line.close()
            if self._child is not None:
                self._child.stop()

    def _take(self, event: Event) -> None:
        if event.what == CONNECTED:
            self._connected, self._welcome = True, False
            self._note("connected to the server")
        elif event.what == GONE:
            self._connected = False
            self._note("the server is gone; waiting for it to come back")
        elif event.what == TRAINING and event.child is self._child:
            self._trained(event.topic, event.envelope)
        elif event.what == DIED and event.child is self._child:
            self._bury(event.topic)
        elif event.what == WELCOME:
            self._settle(*decode_envelope(Welcome, event.envelope))
        elif event.what == JOB:
            self._accept(event.envelope)

    def _settle(self, header: Welcome, run_config: bytes) -> None:
        """The server has welcomed this process: load what it asks for, unless that is loaded."""
        self._welcome = True
        if header.server != self._server:
            self._server, self._newest, self._waiting, self._last = header.server, None, None, None
        if run_config != self._run_config:
            self._run_config, self._current, self._trouble = run_config, None, ""
            self._start_child()
        elif self._loaded:
            self._tell(READY, self._ready)
            if self._last is not None:
                self._tell(*self._last)
        elif self._trouble:
            self._tell(UNREADY, encode_envelope(ServerNotice(explanation=self._trouble)))

    def _accept(self, envelope: bytes) -> None:
        header, _ = decode_envelope(JobHeader, envelope)
        if self._newest is not None and header.job <= self._newest:
            return
        self._newest, self._last = header.job, None
        self._tell(ACCEPTED, encode_envelope(Accepted(job=header.job)))
        # whoever sends a new job does not wait for the one before
        self._waiting = ReceivedWork(header, envelope, time.monotonic(), self._server)
        self._go_on()

    def _go_on(self) -> None:
        """Give the waiting job to the training process, if that is free; start one if there is none."""
        if self._current is not None or self._waiting is None:
            return
        if self._child is None:
            self._start_child()
        elif self._loaded:
            self._current, self._waiting = self._waiting, None
            self._child.send(JOB, self._current.envelope)

    def _trained(self, topic: str, envelope: bytes) -> None:
        if topic == READY:
            self._loaded, self._ready, self._trouble = True, envelope, ""
            self._note("model and data are loaded; ready for jobs")
            self._tell(READY, envelope)
        elif topic == UNREADY:
            self._trouble = decode_envelope(ServerNotice, envelope)[0].explanation
            self._note(f"cannot take part: {self._trouble}")
            self._tell(UNREADY, envelope)
        elif self._current is not None:
            work, self._current = self._current, None
            if topic == ANSWER and work.header.conditions is None:
                answer, carried = decode_envelope(Answer, envelope)
                seconds = time.monotonic() - work.accepted
                envelope = encode_envelope(answer.model_copy(update={"seconds": seconds}), carried)
            self._finish(work, topic, envelope)
        self._go_on()

    def _bury(self, explanation: str) -> None:
        """The training process is dead: say so of the job that it had, and let the next message have a new one."""
        self._note(explanation)
        loaded, self._child, self._loaded = self._loaded, None, False
        if loaded:
            lost, self._current = self._current, None
        else:
            self._trouble = explained(self._trouble or explanation)
            self._tell(UNREADY, encode_envelope(ServerNotice(explanation=self._trouble)))
            lost, self._waiting = self._waiting, None
        if lost is not None:
            why = explained(explanation if loaded else self._trouble)
            self._finish(lost, FAILED, encode_envelope(Failed(job=lost.header.job, explanation=why)))
        if loaded:
            self._start_child()

    def _finish(self, work: ReceivedWork, topic: str, envelope: bytes) -> None:
        """Tell what came of a job, unless the server that sent it is no more."""
        if work.server == self._server:
            self._last = (topic, envelope)
            self._tell(topic, envelope)

    def _start_child(self) -> None:
        if self._child is not None:
            self._child.stop()
        self._loaded = False
        self._child = Child(self._command, self._hear, self._hear_of_death)
        self._child.send(WELCOME, encode_envelope(Empty(), self._setup))
        self._child.send(WELCOME, encode_envelope(Empty(), self._run_config or b""))

    def _tell(self, topic: str, envelope: bytes) -> None:
        if not self._line.send(SERVER, topic, envelope):
            _LOG.info("the server is not connected and did not hear of %r", topic)

    def _hear(self, child: Child, topic: str, envelope: bytes) -> None:
        self._events.put(Event(TRAINING, topic, envelope, child))

    def _hear_of_death(self, child: Child, explanation: str) -> None:
        self._events.put(Event(DIED, explanation, child=child))

    def _hear_of(self, cell: str) -> None:
        if cell == SERVER:
            self._events.put(Event(CONNECTED))

    def _miss(self, cell: str) -> None:
        if cell == SERVER:
            self._events.put(Event(GONE))

    def _receive(self, cell: str, topic: str, envelope: bytes) -> None:
        if cell != SERVER:
            return
        try:
            if topic == LEAVE:
                decode_envelope(ServerNotice, envelope)
                self._events.put(Event(STOP, envelope=envelope))
            elif topic in (WELCOME, JOB):
                decode_envelope(Welcome if topic == WELCOME else JobHeader, envelope)
                self._events.put(Event(topic, envelope=envelope))
        except MessageError as error:
            _LOG.warning("refused what the server says on topic %r: %s", topic, error)
