"""The local engine: a simulated fleet in this process, on a virtual clock.

Messages are packed and unpacked for real, so their bytes are those of a network. Devices work one after another here,
and at the same time on the virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from spinecli.data.encoding import Encoded
from spinecli.federation.client.device import DeviceMemory
from spinecli.federation.engine import Job, Lost, Node, Reply, Snapshot
from spinecli.federation.messages import Message
from spinecli.federation.simulation.fleet import Fleet
from spinecli.federation.simulation.virtual_clock import VirtualClock, VirtualMeter


class Worker(Protocol):
    """What a device does its work with."""

    @property
    def memory(self) -> DeviceMemory:
        """What stays on it from round to round."""

    def abandon(self) -> None:
        """It was lost on the way; what it has begun leads nowhere."""


Work = TypeVar("Work", bound=Worker)


@dataclass(frozen=True, eq=False)
class Simulated(Generic[Work]):
    """A device of the fleet: its work, the meter that its work charges, and what it says of its data."""

    work: Work
    meter: VirtualMeter
    examples: int
    label_counts: tuple[int, ...]
    """Examples of each label; empty where there are no labels."""


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
        self._clock = VirtualClock(fleet, seed)

    def nodes(self) -> Sequence[Node]:
        """The devices of the fleet, in its order."""
        return [
            Node(
                spec.name,
                spec.device_class.name,
                spec.device_class.memory_bytes,
                self._devices[spec.name].examples,
                self._devices[spec.name].label_counts,
            )
            for spec in self._fleet.devices
        ]

    def now(self) -> float:
        """Virtual seconds since the run began."""
        return self._clock.now

    def work(self, flops: float) -> None:
        """Move the clock on by what the fleet's server needs for `flops`."""
        self._clock.work(flops)

    def exchange(self, jobs: Sequence[Job], deadline: float | None) -> list[Reply | Lost]:
        """Let every device do its job; the clock moves on to when the server has what it waits for."""
        outcomes = self._clock.close([self._ask(job) for job in jobs], deadline)
        for outcome in outcomes:
            if isinstance(outcome, Lost):
                self._devices[outcome.device].work.abandon()
        return outcomes

    def _ask(self, job: Job) -> Reply | Lost:
        device = self._devices[job.device]
        sent = job.message.pack()
        if (lost := self._clock.failure(job, len(sent))) is not None:
            return lost
        device.meter.begin(self._clock.conditions(job))
        answer = self._handle(job.kind, Message.unpack(sent), device.work).pack()
        return self._clock.reply(job, len(sent), device.meter.total, answer)

    def snapshot(self) -> Snapshot:
        """The clock, and what every device remembers."""
        tensors = {
            f"{name}/{key}": value
            for name, device in self._devices.items()
            for key, value in device.work.memory.tensors.items()
        }
        return Snapshot(self._clock.values(), tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        self._clock.restore(snapshot.values)
        for name, device in self._devices.items():
            prefix = f"{name}/"
            kept = {
                key.removeprefix(prefix): value for key, value in snapshot.tensors.items() if key.startswith(prefix)
            }
            device.work.memory.tensors = kept


def simulated(
    fleet: Fleet,
    data: Encoded,
    parts: Sequence[Sequence[int]],
    device: Callable[[str, Sequence[int], DeviceMemory, VirtualMeter], Work],
    handle: Callable[[str, Message, Work], Message],
    seed: int,
) -> LocalEngine[Work]:
    """A fleet whose devices remember nothing yet.

    Args:
        data: of all devices.
        parts: the examples of each device, in the fleet's order.
        device: makes what a device does its work with, given its name, its examples, its memory and its meter.
        handle: what a device does with a message.
        seed: of the fleet's conditions.
    """
    devices: dict[str, Simulated[Work]] = {}
    for spec, part in zip(fleet.devices, parts, strict=True):
        meter = VirtualMeter()
        work = device(spec.name, part, DeviceMemory(), meter)
        devices[spec.name] = Simulated(work, meter, len(part), data.label_counts(part))
    return LocalEngine(fleet, devices, handle, seed)
