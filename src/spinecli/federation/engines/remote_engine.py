"""What every engine does that reaches devices elsewhere: jobs as requests, and their outcomes on the clock that counts.

That clock is the time that passes, or a simulated fleet's. On the fleet's clock every job takes its conditions to the
device, the answer says the seconds of work, and deadlines and failing devices are the fleet's.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from spinecli.errors import MessageError
from spinecli.federation.engine import Job, Lost, Node, Reply, Snapshot
from spinecli.federation.engines.envelope import JobHeader, encode_envelope
from spinecli.federation.engines.pending_request import PendingRequest
from spinecli.federation.simulation.conditions import Conditions
from spinecli.federation.simulation.virtual_clock import VirtualClock


class RemoteEngine(ABC):
    """An engine but for its devices and for how requests travel to them.

    Args:
        clock: counts the seconds of a simulated fleet; None: the seconds that pass.
    """

    def __init__(self, clock: VirtualClock | None) -> None:
        self._clock = clock
        self._run = secrets.token_hex(8)
        self._zero = time.monotonic()
        self._number = 0

    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """The run's devices, in a fixed order."""

    @abstractmethod
    def _carry(self, requests: list[PendingRequest], deadline: float | None) -> None:
        """Send requests, and return when each has an answer or a failure, or the seconds of the deadline have passed.

        Raises: FederationError if every device has gone.
        """

    def _begin(self) -> None:
        """The run begins now."""
        self._zero = time.monotonic()

    def now(self) -> float:
        """Seconds since the run began: those of the fleet's clock, or those that have passed."""
        return time.monotonic() - self._zero if self._clock is None else self._clock.now

    def work(self, flops: float) -> None:
        """Tell the fleet's clock; the time that passes needs not be told."""
        if self._clock is not None:
            self._clock.work(flops)

    def exchange(self, jobs: Sequence[Job], deadline: float | None) -> list[Reply | Lost]:
        """Send all jobs at once and wait for the answers, in the order of the jobs.

        Raises: FederationError if every device has gone.
        """
        if self._clock is not None:
            return self._clock.close(self._simulated(jobs, self._clock), deadline)
        began = time.monotonic()
        requests = [self._pending(job, job.message.pack()) for job in jobs]
        self._carry(requests, deadline)
        return [self._outcome(pending, began, deadline) for pending in requests]

    def _simulated(self, jobs: Sequence[Job], clock: VirtualClock) -> list[Reply | Lost]:
        """The outcomes on the fleet's clock; the deadline is on that clock, too."""
        packed = [job.message.pack() for job in jobs]
        failures = [clock.failure(job, len(blob)) for job, blob in zip(jobs, packed, strict=True)]
        requests = [
            self._pending(job, blob, clock.conditions(job))
            for job, blob, failure in zip(jobs, packed, failures, strict=True)
            if failure is None
        ]
        self._carry(requests, None)
        carried = iter(requests)
        return [failure or self._counted(next(carried), clock) for failure in failures]

    def _counted(self, pending: PendingRequest, clock: VirtualClock) -> Reply | Lost:
        """A request's outcome on the fleet's clock, where a device that is really lost fails after its download."""
        if pending.answer is None:
            seconds = clock.conditions(pending.job).download_seconds(pending.bytes_down)
            return Lost(pending.job.device, "failed", pending.failure or "", seconds, pending.bytes_down)
        try:
            return clock.reply(pending.job, pending.bytes_down, pending.seconds, pending.answer)
        except MessageError as error:
            return Lost(pending.job.device, "refused", str(error), pending.seconds, pending.bytes_down)

    def _outcome(self, pending: PendingRequest, began: float, deadline: float | None) -> Reply | Lost:
        if pending.answer is None:
            return pending.late(deadline) if pending.open and deadline is not None else pending.lost(began)
        try:
            return pending.reply(pending.answer, self._zero)
        except MessageError as error:
            seconds = pending.arrived - began
            return Lost(pending.job.device, "refused", str(error), seconds, pending.bytes_down)

    def _pending(self, job: Job, blob: bytes, current: Conditions | None = None) -> PendingRequest:
        self._number += 1
        header = JobHeader(job=self._number, run=self._run, kind=job.kind, conditions=current)
        return PendingRequest(self._number, job, encode_envelope(header, blob), len(blob))

    def snapshot(self) -> Snapshot:
        """The clock, and the run's name, by which devices find what they remember."""
        clock = {"clock": self.now()} if self._clock is None else self._clock.values()
        return Snapshot({"run": self._run, **clock}, {})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        run, clock = snapshot.values.get("run"), snapshot.values.get("clock")
        if not isinstance(run, str) or not isinstance(clock, float):
            raise TypeError("the snapshot is of another engine")
        self._run = run
        self._zero = time.monotonic() - clock
        if self._clock is not None:
            self._clock.restore({name: value for name, value in snapshot.values.items() if name != "run"})
