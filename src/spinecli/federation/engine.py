"""The seam between rounds and what carries them: devices by name, one exchange of messages, one clock.

The round loop and the strategies know nothing else of where devices are. The local engine simulates a fleet in this
process on a virtual clock; an engine over a network does the same with real devices and wall time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import JsonValue
from torch import Tensor

from spinecli.federation.messages import Message


@dataclass(frozen=True)
class Node:
    """What a device says of itself when it enrols."""

    name: str
    device_class: str
    memory_bytes: int
    examples: int
    label_counts: tuple[int, ...] = ()
    """How many examples it has of each label; empty where there are no labels."""


@dataclass(frozen=True, eq=False)
class Job:
    """One request to one device."""

    device: str
    kind: str
    round: int
    message: Message
    part: int = 0
    """Which of the round's exchanges with this device it is, counted from 0."""
    parts: int = 1
    """How many exchanges the round has."""


@dataclass(frozen=True)
class Timing:
    """When what happened, in seconds of the engine's clock, and how many bytes travelled."""

    sent: float
    """The server began to send."""
    started: float
    """The device had the whole message."""
    finished: float
    """The device had its answer ready."""
    arrived: float
    """The server had the whole answer."""
    bytes_down: int
    bytes_up: int

    @property
    def download_seconds(self) -> float:
        """From server to device."""
        return self.started - self.sent

    @property
    def compute_seconds(self) -> float:
        """On the device."""
        return self.finished - self.started

    @property
    def upload_seconds(self) -> float:
        """From device to server."""
        return self.arrived - self.finished

    @property
    def seconds(self) -> float:
        """From the first byte sent to the last received."""
        return self.arrived - self.sent


@dataclass(frozen=True, eq=False)
class Reply:
    """A device's answer."""

    device: str
    message: Message
    timing: Timing


LossReason = Literal["failed", "late", "refused"]


@dataclass(frozen=True)
class Lost:
    """A device without a usable answer in this exchange."""

    device: str
    reason: LossReason
    explanation: str
    seconds: float
    """From the start of the exchange until the server knew."""
    bytes_down: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an engine must keep across a kill: small values and tensors."""

    values: dict[str, JsonValue]
    tensors: Mapping[str, Tensor]


class Engine(Protocol):
    """Carries messages between the server and its devices."""

    def nodes(self) -> Sequence[Node]:
        """The devices that can be asked, in a fixed order."""

    def exchange(self, jobs: Sequence[Job], deadline: float | None) -> list[Reply | Lost]:
        """Send all jobs at once and wait for the answers, in the order of the jobs.

        Args:
            deadline: seconds after which the missing answers are given up; None waits for all.
        """

    def work(self, flops: float) -> None:
        """The server has computed so much since the last exchange; only a virtual clock needs to be told."""

    def now(self) -> float:
        """Seconds on this engine's clock since the run began."""

    def snapshot(self) -> Snapshot:
        """What `restore` needs to go on from here."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""


Connect = Callable[[Path], AbstractContextManager[Engine]]
"""Opens an engine for the length of a run, given a directory that lasts until the run is finished."""
