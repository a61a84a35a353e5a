"""One job on its way to a device and back."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.federation.engine import Job, Lost, Reply, Timing
from spinecli.federation.messages import Message


@dataclass(eq=False)
class PendingRequest:
    """A job, and what the server knows of it. Times are those of a monotonic clock."""

    number: int
    job: Job
    envelope: bytes
    """The job as it is sent."""
    bytes_down: int
    """Of the message in it."""
    cell: str = ""
    """The process that it was sent to."""
    sent: float = 0.0
    accepted: float | None = None
    """When the server heard that the device has it all."""
    arrived: float = 0.0
    """When the server had the answer, or knew that there will be none."""
    seconds: float = 0.0
    """That the device has worked, as it says."""
    answer: bytes | None = None
    failure: str | None = None

    @property
    def open(self) -> bool:
        """Whether it is still waited for."""
        return self.answer is None and self.failure is None

    def fail(self, now: float, explanation: str) -> None:
        """Wait no longer."""
        self.arrived, self.failure = now, explanation

    @property
    def spent_bytes(self) -> int:
        """What went to the device."""
        return self.bytes_down if self.cell else 0

    def lost(self, began: float) -> Lost:
        """The failure as an outcome of the exchange that began then."""
        return Lost(self.job.device, "failed", self.failure or "", self.arrived - began, self.spent_bytes)

    def late(self, deadline: float) -> Lost:
        """The outcome of a pending that is open when the deadline has come."""
        explanation = f"there was no answer within {deadline:.3g} s"
        return Lost(self.job.device, "late", explanation, deadline, self.spent_bytes)

    def reply(self, answer: bytes, zero: float) -> Reply:
        """The answer, with times counted from `zero`. Raises MessageError if it is malformed.

        Clocks of different machines are not compared: the download ends when the server hears that it has, and the
        upload is what is left when the device's own figure for its work is taken off.
        """
        started = min(self.accepted if self.accepted is not None else self.arrived, self.arrived)
        finished = min(started + self.seconds, self.arrived)
        timing = Timing(
            self.sent - zero, started - zero, finished - zero, self.arrived - zero, self.bytes_down, len(answer)
        )
        return Reply(self.job.device, Message.unpack(answer), timing)
