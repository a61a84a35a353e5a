"""The server's side: jobs go out as messages of Flower, and their answers, or what became of them, come back."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from spinecli.errors import FederationError, MessageError
from spinecli.federation.engine import Node
from spinecli.federation.engines.enrolment_status import EnrolmentStatus
from spinecli.federation.engines.envelope import (
    ANSWER,
    FAILED,
    JOB,
    Answer,
    Empty,
    Failed,
    decode_envelope,
    encode_envelope,
)
from spinecli.federation.engines.flower.link import Link, Received
from spinecli.federation.engines.flower.payload import ENROLLED, Enrolled
from spinecli.federation.engines.pending_request import PendingRequest
from spinecli.federation.engines.remote_engine import RemoteEngine
from spinecli.federation.simulation.virtual_clock import VirtualClock

_LOG = logging.getLogger("flwr.spine")
_GLANCE_SECONDS = 0.1
"""Between two looks at what has come."""
_QUESTIONS = 3
"""That are put to a SuperNode whose processes fail before they can say who they are."""
QUERY, TRAIN = "query", "train"
"""What Flower calls the two kinds of messages."""


class FlowerEngine(RemoteEngine):
    """Carries messages to SuperNodes of Flower.

    Args:
        tokens: of the devices, by their names, in the order that the run has them.
        link: to the SuperNodes.
        ended: says how a device's process has ended; None while it runs.
        clock: counts the seconds of a simulated fleet; None: the seconds that pass.
    """

    def __init__(
        self,
        tokens: Mapping[str, str],
        link: Link,
        ended: Callable[[str], str | None],
        clock: VirtualClock | None = None,
    ) -> None:
        self._tokens = tokens
        self._link = link
        self._ended = ended
        super().__init__(clock)
        self._addresses: dict[str, int] = {}
        self._nodes: dict[str, Node] = {}

    def wait_for_all(self, look: Callable[[EnrolmentStatus], None]) -> None:
        """Ask every SuperNode who it is, until each device is ready; the run begins then.

        Args:
            look: called again and again with how far they are; may raise.

        Raises: FederationError if SuperNodes do not come to say who they are.
        """
        asked: dict[str, int] = {}
        times: dict[int, int] = {}
        troubles: dict[str, str] = {}
        failure = ""
        while len(self._nodes) < len(self._tokens):
            for address in self._link.nodes() - set(asked.values()):
                if times.get(address, 0) < _QUESTIONS and address not in self._addresses.values():
                    times[address] = times.get(address, 0) + 1
                    if number := self._link.send(address, QUERY, ENROLLED, encode_envelope(Empty())):
                        asked[number] = address
            for number, received in self._link.receive(asked.keys()).items():
                failure = self._enrol(asked.pop(number), received, troubles) or failure
            if failure and not asked and all(count == _QUESTIONS for count in times.values()):
                raise FederationError(f"A device fails before it can say who it is: {failure}")
            look(EnrolmentStatus(tuple(self._nodes), troubles))
            time.sleep(_GLANCE_SECONDS)
        self._begin()

    def _enrol(self, address: int, received: Received, troubles: dict[str, str]) -> str:
        """Take note of who a SuperNode is; returns why it could not be."""
        if received.failure:
            return received.failure
        try:
            enrolled, _ = decode_envelope(Enrolled, received.envelope)
        except MessageError as error:
            return str(error)
        token = self._tokens.get(enrolled.device, "")
        if received.topic != ENROLLED or not token or not hmac.compare_digest(token.encode(), enrolled.token.encode()):
            _LOG.warning("refused a SuperNode that wants to be %r and cannot show it", enrolled.device)
            return ""
        self._addresses[enrolled.device] = address
        if enrolled.ready is None:
            troubles[enrolled.device] = enrolled.trouble
        else:
            self._nodes[enrolled.device] = Node(enrolled.device, **enrolled.ready.model_dump())
        return ""

    def nodes(self) -> Sequence[Node]:
        """The run's devices, in a fixed order."""
        return [self._nodes[name] for name in self._tokens]

    def _carry(self, requests: list[PendingRequest], deadline: float | None) -> None:
        """Send the requests and wait until each has an answer or a failure, or the deadline has come."""
        began = time.monotonic()
        sent = {number: pending for pending in requests if (number := self._send(pending)) is not None}
        while waiting := {number: pending for number, pending in sent.items() if pending.open}:
            now = time.monotonic()
            if deadline is not None and now >= began + deadline:
                break
            for number, pending in waiting.items():
                if pending.accepted is None and self._link.fetched(number):
                    pending.accepted = now
            for number, received in self._link.receive(waiting.keys()).items():
                _settle(waiting[number], received, now)
            for pending in waiting.values():
                if pending.open and (ending := self._ended(pending.job.device)) is not None:
                    pending.fail(now, ending)
            time.sleep(_GLANCE_SECONDS)
        for number, pending in sent.items():
            if pending.answer is None:
                self._link.forget(number)
        if all(pending.failure for pending in requests) and all(self._ended(name) for name in self._tokens):
            raise FederationError("All devices are gone; run the same command with --resume to continue.")

    def _send(self, pending: PendingRequest) -> str | None:
        """Put a pending where its device looks for it; returns the message's id."""
        now, device = time.monotonic(), pending.job.device
        if (ending := self._ended(device)) is not None:
            pending.fail(now, ending)
            return None
        number = self._link.send(self._addresses[device], TRAIN, JOB, pending.envelope)
        if number is None:
            pending.fail(now, "its SuperNode has left")
        else:
            pending.cell, pending.sent = str(self._addresses[device]), now
        return number


def _settle(pending: PendingRequest, received: Received, now: float) -> None:
    """Write down what has come in answer to a pending."""
    if received.failure:
        pending.fail(now, received.failure)
        return
    try:
        if received.topic == FAILED:
            pending.fail(now, decode_envelope(Failed, received.envelope)[0].explanation)
            return
        answer, carried = decode_envelope(Answer, received.envelope)
        if received.topic != ANSWER or answer.job != pending.number:
            raise MessageError("It answers something else than it was asked.")
    except MessageError as error:
        pending.fail(now, str(error))
        return
    pending.arrived, pending.seconds, pending.answer = now, answer.seconds, carried
