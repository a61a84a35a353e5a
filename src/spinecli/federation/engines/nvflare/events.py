"""What a device's process hears, from whichever thread, and the jobs that come of it."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.federation.engines.envelope import JobHeader
from spinecli.federation.engines.nvflare.child import Child

CONNECTED, GONE, TRAINING, DIED, STOP = "connected", "gone", "training", "died", "stop"


@dataclass(frozen=True)
class Event:
    """Something that a thread has heard."""

    what: str
    """One of the above, or the topic of what the server says."""
    topic: str = ""
    """Of what the training process says, or how it ended."""
    envelope: bytes = b""
    child: Child | None = None
    """The training process that it comes from."""


@dataclass(eq=False)
class ReceivedWork:
    """A job that has arrived."""

    header: JobHeader
    envelope: bytes
    accepted: float
    """When it was there; monotonic."""
    server: str
    """Whose it is."""
