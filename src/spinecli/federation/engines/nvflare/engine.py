"""The server's side: jobs go out to the devices that have come, and answers come back or do not."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence

from spinecli.errors import FederationError
from spinecli.federation.engine import Node
from spinecli.federation.engines.enrolment_status import EnrolmentStatus
from spinecli.federation.engines.envelope import JOB, LEAVE, RUN_IS_OVER, ServerNotice, encode_envelope
from spinecli.federation.engines.nvflare.certificates import Identity
from spinecli.federation.engines.nvflare.connection import Address, Connection
from spinecli.federation.engines.nvflare.members import Member, Members, Timeouts
from spinecli.federation.engines.nvflare.names import SERVER
from spinecli.federation.engines.pending_request import PendingRequest
from spinecli.federation.engines.remote_engine import RemoteEngine
from spinecli.federation.simulation.virtual_clock import VirtualClock

_GLANCE_SECONDS = 0.5
"""Between two looks at who has fallen silent."""
_FAREWELL_SECONDS = 0.3
"""For the last words to go out."""


class NvflareEngine(RemoteEngine):
    """Carries messages to devices that connect to this process.

    Args:
        names: of the devices, in the order that the run has them.
        run_config: what devices are told before their first job; opaque to the engine.
        address: where to listen.
        identity: of the server; None leaves the line unprotected.
        clock: counts the seconds of a simulated fleet; None: the seconds that pass.

    Raises: FederationError if nothing can listen there.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_config: bytes,
        address: Address,
        identity: Identity | None,
        clock: VirtualClock | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        address.require_free()
        self._names = tuple(names)
        super().__init__(clock)
        self._timeouts = timeouts or Timeouts()
        self._nodes: tuple[Node, ...] = ()
        self._parcels: dict[int, PendingRequest] = {}
        self._changed = threading.Condition()
        self._members = Members(
            frozenset(names), run_config, secrets.token_hex(8), self._parcels, self._changed, self._send
        )
        self._line = Connection(SERVER, address, identity, self._members.receive, _unheard, self._members.gone)
        self._line.open()

    def wait_for_all(self, look: Callable[[EnrolmentStatus], None]) -> None:
        """Wait until every device is ready; the run begins then.

        Args:
            look: called again and again with how far they are; may raise.
        """
        with self._changed:
            while len(nodes := self._ready()) < len(self._names):
                troubles = {name: member.trouble for name, member in self._members.known.items() if member.trouble}
                look(EnrolmentStatus(tuple(nodes), troubles))
                self._changed.wait(_GLANCE_SECONDS)
            self._nodes = tuple(nodes[name] for name in self._names)
            self._begin()

    def _ready(self) -> dict[str, Node]:
        return {
            name: member.node
            for name, member in self._members.known.items()
            if member.ready and member.left is None and member.node is not None
        }

    def nodes(self) -> Sequence[Node]:
        """The run's devices, in a fixed order."""
        return self._nodes

    def _carry(self, requests: list[PendingRequest], deadline: float | None) -> None:
        """Send the requests and wait until each has an answer or a failure, or the deadline has come."""
        began = time.monotonic()
        with self._changed:
            self._parcels |= {pending.number: pending for pending in requests}
            try:
                while True:
                    now = time.monotonic()
                    for pending in requests:
                        if pending.open:
                            self._look_after(pending, now, began)
                    left = _GLANCE_SECONDS if deadline is None else min(_GLANCE_SECONDS, began + deadline - now)
                    if left <= 0 or not any(pending.open for pending in requests):
                        break
                    self._changed.wait(left)
            finally:
                for pending in requests:
                    del self._parcels[pending.number]
        if requests and all(pending.failure for pending in requests):
            self._require_company()

    def _look_after(self, pending: PendingRequest, now: float, began: float) -> None:
        """Send a pending that has not gone out, and give up one whose device is gone."""
        member = self._members.known[pending.job.device]
        if pending.cell and pending.cell != member.cell:
            pending.fail(now, "its process ended in the round")
        elif member.left is not None:
            if now - member.left > self._timeouts.gone:
                pending.fail(now, f"its connection has been broken for more than {self._timeouts.gone:g} s")
        elif now - member.heard > self._timeouts.silent:
            pending.fail(now, f"it has given no sign of life for {self._timeouts.silent:g} s")
        elif not pending.cell:
            self._send_off(pending, member, now)

    def _send_off(self, pending: PendingRequest, member: Member, now: float) -> None:
        if not member.ready and not member.trouble:
            # where all are loading, a round without anybody would be lost for good
            if self._ready():
                pending.fail(now, "it has been started anew and is still loading its model")
        elif self._send(member.cell, JOB, pending.envelope):
            pending.cell, pending.sent = member.cell, now

    def _require_company(self) -> None:
        now, members = time.monotonic(), self._members.known.values()

        def has_gone(member: Member) -> bool:
            return member.left is not None and now - member.left > self._timeouts.gone

        if all(member.trouble or has_gone(member) for member in members):
            troubles = "".join(f" {member.trouble}" for member in members if member.trouble)
            raise FederationError(
                "All devices are gone or cannot take part; start them again and run the same command with --resume to "
                f"continue.{troubles}"
            )

    def _send(self, cell: str, topic: str, envelope: bytes) -> bool:
        if self._line.send(cell, topic, envelope):
            return True
        self._members.gone(cell)
        return False

    def close(self, explanation: str = RUN_IS_OVER) -> None:
        """Send all devices home and free the port."""
        with self._changed:
            for member in self._members.known.values():
                self._line.send(member.cell, LEAVE, encode_envelope(ServerNotice(explanation=explanation)))
        time.sleep(_FAREWELL_SECONDS)
        self._line.close()


def _unheard(cell: str) -> None:
    """A connection says nothing yet; its process will."""
