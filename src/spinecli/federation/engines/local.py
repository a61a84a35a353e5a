"""The local engine: a simulated fleet in this process, on a virtual clock.

Messages are packed and unpacked for real, so their bytes are those of a network. Devices work one after another here,
and at the same time on the virtual clock: a device's round is download, compute and upload, from its conditions in that
round, and the exchange ends when the last answer is in or the deadline has come. The server's own work takes the time
that its FLOPs take at the fleet's server speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from pydantic import JsonValue

from spinecli.federation.conditions import Conditions, conditions
from spinecli.federation.device.device import DeviceMemory
from spinecli.federation.engine import Job, Lost, Node, Reply, Snapshot, Timing
from spinecli.federation.fleet import Fleet
from spinecli.federation.messages import Message


class VirtualMeter:
    """Turns a device's FLOPs into seconds of the virtual clock."""

    def __init__(self) -> None:
        self._conditions: Conditions | None = None
        self._seconds: dict[str, float] = {}

    def begin(self, current: Conditions) -> None:
        """A new job, under the conditions of its round."""
        self._conditions, self._seconds = current, {}

    def charge(self, phase: str, flops: float) -> None:
        """Count `flops` under `phase`."""
        if self._conditions is None:
            raise RuntimeError("a device works outside of a job")
        self._seconds[phase] = self._seconds.get(phase, 0.0) + self._conditions.compute_seconds(flops)

    def seconds(self, phase: str) -> float:
        """Seconds charged to `phase` in this job."""
        return self._seconds.get(phase, 0.0)

    @property
    def total(self) -> float:
        """Seconds of this job."""
        return sum(self._seconds.values())


class Worker(Protocol):
    """What a device does its work with."""

    @property
    def memory(self) -> DeviceMemory:
        """What stays on it from round to round."""

    @property
    def examples(self) -> int:
        """Size of its data set."""

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Examples of each label; empty where there are no labels."""


Work = TypeVar("Work", bound=Worker)


@dataclass(frozen=True, eq=False)
class Simulated(Generic[Work]):
    """A device of the fleet: its work, and the meter that its work charges."""

    work: Work
    meter: VirtualMeter


class LocalEngine(Generic[Work]):
    """Runs a fleet in this process.

    Args:
        fleet: the devices.
        devices: what each does its work with, by name.
        handle: what a device does with a message, given what it does its work with.
        seed: of the fleet's conditions.
    """

    def __init__(
        self,
        fleet: Fleet,
        devices: Mapping[str, Simulated[Work]],
        handle: Callable[[str, Message, Work], Message],
        seed: int,
    ) -> None:
        self._fleet = fleet
        self._devices = devices
        self._handle = handle
        self._seed = seed
        self._specs = {spec.name: spec for spec in fleet.devices}
        self._clock = 0.0
        self._usual_seconds: dict[str, float] = {}

    def nodes(self) -> Sequence[Node]:
        """The devices of the fleet, in its order."""
        return [
            Node(
                spec.name,
                spec.device_class.name,
                spec.device_class.memory_bytes,
                self._devices[spec.name].work.examples,
                self._devices[spec.name].work.label_counts,
            )
            for spec in self._fleet.devices
        ]

    def now(self) -> float:
        """Virtual seconds since the run began."""
        return self._clock

    def work(self, flops: float) -> None:
        """Move the clock on by what the fleet's server needs for `flops`."""
        self._clock += flops / self._fleet.server_flops

    def exchange(self, jobs: Sequence[Job], deadline: float | None) -> list[Reply | Lost]:
        """Let every device do its job; the clock moves on to when the server has what it waits for."""
        start = self._clock
        outcomes = [self._ask(job, start) for job in jobs]
        if deadline is not None:
            outcomes = [_late(outcome, deadline) if _seconds(outcome) > deadline else outcome for outcome in outcomes]
        self._clock = start + max((_seconds(outcome) for outcome in outcomes), default=0.0)
        return outcomes

    def _ask(self, job: Job, start: float) -> Reply | Lost:
        device, spec = self._devices[job.device], self._specs[job.device]
        current = conditions(spec, self._seed, job.round)
        sent = job.message.pack()
        started = start + current.download_seconds(len(sent))
        if current.fails_at is not None and (share := current.fails_at * job.parts - job.part) < 1:
            # its work is lost, so it is not done: it breaks off within the time that its last exchange took
            gone = started + max(share, 0.0) * self._usual_seconds.get(job.device, 0.0)
            return Lost(job.device, "failed", "the device failed in its round", gone - start, len(sent))
        device.meter.begin(current)
        answer = self._handle(job.kind, Message.unpack(sent), device.work).pack()
        self._usual_seconds[job.device] = device.meter.total
        finished = started + device.meter.total
        arrived = finished + current.upload_seconds(len(answer))
        timing = Timing(start, started, finished, arrived, len(sent), len(answer))
        return Reply(job.device, Message.unpack(answer), timing)

    def snapshot(self) -> Snapshot:
        """The clock, and what every device remembers."""
        usual: dict[str, JsonValue] = dict(sorted(self._usual_seconds.items()))
        tensors = {
            f"{name}/{key}": value
            for name, device in self._devices.items()
            for key, value in device.work.memory.tensors.items()
        }
        return Snapshot({"clock": self._clock, "usual_seconds": usual}, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        clock, usual = snapshot.values["clock"], snapshot.values["usual_seconds"]
        if not isinstance(clock, float) or not isinstance(usual, dict):
            raise TypeError("the snapshot is of another engine")
        self._clock = clock
        self._usual_seconds = {name: float(str(seconds)) for name, seconds in usual.items()}
        for name, device in self._devices.items():
            prefix = f"{name}/"
            kept = {
                key.removeprefix(prefix): value for key, value in snapshot.tensors.items() if key.startswith(prefix)
            }
            device.work.memory.tensors = kept


def _seconds(outcome: Reply | Lost) -> float:
    return outcome.timing.seconds if isinstance(outcome, Reply) else outcome.seconds


def _late(outcome: Reply | Lost, deadline: float) -> Lost:
    """An outcome that the server did not wait for: it has paid for the download and knows at the deadline."""
    if isinstance(outcome, Lost):
        return replace(outcome, seconds=deadline)
    explanation = f"its answer would have come after {outcome.timing.seconds:.3g} s"
    return Lost(outcome.device, "late", explanation, deadline, outcome.timing.bytes_down)
