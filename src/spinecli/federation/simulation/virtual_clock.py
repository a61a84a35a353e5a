"""The clock of a simulated fleet: how long each message and each device's work would have taken on it.

A device's round is download, compute and upload, from its conditions in that round. The exchange ends when the last
answer is in or the deadline has come. The server's own work takes the time that its FLOPs take at the fleet's server
speed. Whoever carries the messages, in this process or over a network, comes to the same seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from pydantic import JsonValue

from spinecli.federation.engine import Job, Lost, Reply, Timing
from spinecli.federation.messages import Message
from spinecli.federation.simulation.fleet import DeviceSpec, Fleet

_STANDARD_NORMAL = NormalDist()


@dataclass(frozen=True)
class Conditions:
    """One device in one round. A strategy never sees it, only the times that follow from it."""

    flops_per_second: float
    up_bits_per_second: float
    down_bits_per_second: float
    latency_seconds: float
    """Per message, either way."""
    jitter: float
    """Factor on the compute time; its median is 1."""
    fails_at: float | None
    """Share in [0, 1) of the round's compute time after which the device fails; None if it does not fail."""

    def compute_seconds(self, flops: float) -> float:
        """Time to compute `flops` floating-point operations."""
        return flops / self.flops_per_second * self.jitter

    def upload_seconds(self, size: int) -> float:
        """Time of one message of `size` bytes to the server."""
        return self.latency_seconds + 8 * size / self.up_bits_per_second

    def download_seconds(self, size: int) -> float:
        """Time of one message of `size` bytes from the server."""
        return self.latency_seconds + 8 * size / self.down_bits_per_second


def conditions(device: DeviceSpec, seed: int, round_number: int) -> Conditions:
    """The conditions of `device` in one round, counted from 0.

    Mode and links change together every `mode_rounds` rounds. One draw, the quality of the link, places both uplink and
    downlink in their intervals: a device far from its access point has both slow. Jitter and failures are drawn anew in
    every round.
    """
    if round_number < 0:
        raise ValueError(f"rounds count from 0, not {round_number}")
    device_class = device.device_class
    period = round_number // device_class.mode_rounds if device_class.mode_rounds else 0
    mode = int(_uniform(seed, device, "mode", period) * len(device_class.modes))
    link = _uniform(seed, device, "link", period)
    deviation = _STANDARD_NORMAL.inv_cdf(_uniform(seed, device, "jitter", round_number))
    fails = _uniform(seed, device, "failure", round_number) < device_class.dropout
    return Conditions(
        flops_per_second=device_class.modes[mode],
        up_bits_per_second=1e6 * _within(device_class.up_mbps, link),
        down_bits_per_second=1e6 * _within(device_class.down_mbps, link),
        latency_seconds=device_class.latency_ms / 1e3,
        jitter=math.exp(device_class.jitter * deviation),
        fails_at=_uniform(seed, device, "failure time", round_number) if fails else None,
    )


def _within(band: tuple[float, float], share: float) -> float:
    low, high = band
    return low + share * (high - low)


def _uniform(seed: int, device: DeviceSpec, purpose: str, number: int) -> float:
    """A number in (0, 1), uniform over what is hashed and the same on every machine."""
    key = json.dumps([seed, device.name, purpose, number]).encode()
    bits = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 12
    return (bits + 0.5) / 2**52


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


class VirtualClock:
    """Seconds since the run began, on a fleet whose conditions are drawn from `seed`."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._seed = seed
        self._specs = {spec.name: spec for spec in fleet.devices}
        self._usual_seconds: dict[str, float] = {}
        self.now = 0.0

    def work(self, flops: float) -> None:
        """Move on by what the fleet's server needs for `flops`."""
        self.now += flops / self._fleet.server_flops

    def conditions(self, job: Job) -> Conditions:
        """What holds for the job's device in the job's round."""
        return conditions(self._specs[job.device], self._seed, job.round)

    def failure(self, job: Job, bytes_down: int) -> Lost | None:
        """The end of a device that fails in its round; None of one that does not.

        Its work is lost and need not be done: it breaks off within the time that its last exchange took.
        """
        current = self.conditions(job)
        if current.fails_at is None or (share := current.fails_at * job.parts - job.part) >= 1:
            return None
        started = self.now + current.download_seconds(bytes_down)
        gone = started + max(share, 0.0) * self._usual_seconds.get(job.device, 0.0)
        return Lost(job.device, "failed", "the device failed in its round", gone - self.now, bytes_down)

    def reply(self, job: Job, bytes_down: int, seconds: float, answer: bytes) -> Reply:
        """A device's answer, sent after so many seconds of work. Raises MessageError if it is malformed."""
        current = self.conditions(job)
        self._usual_seconds[job.device] = seconds
        started = self.now + current.download_seconds(bytes_down)
        finished = started + seconds
        arrived = finished + current.upload_seconds(len(answer))
        timing = Timing(self.now, started, finished, arrived, bytes_down, len(answer))
        return Reply(job.device, Message.unpack(answer), timing)

    def close(self, outcomes: Sequence[Reply | Lost], deadline: float | None) -> list[Reply | Lost]:
        """End an exchange: give up who is late, and move on to when the server has what it waits for."""
        closed = list(outcomes)
        if deadline is not None:
            closed = [_late(outcome, deadline) if _seconds(outcome) > deadline else outcome for outcome in closed]
        self.now += max((_seconds(outcome) for outcome in closed), default=0.0)
        return closed

    def values(self) -> dict[str, JsonValue]:
        """What `restore` needs to go on from here."""
        usual: dict[str, JsonValue] = dict(sorted(self._usual_seconds.items()))
        return {"clock": self.now, "usual_seconds": usual}

    def restore(self, values: dict[str, JsonValue]) -> None:
        """Go on from `values`."""
        clock, usual = values.get("clock"), values.get("usual_seconds")
        if not isinstance(clock, float) or not isinstance(usual, dict):
            raise TypeError("the snapshot is of another engine")
        self.now = clock
        self._usual_seconds = {name: float(str(seconds)) for name, seconds in usual.items()}


def _seconds(outcome: Reply | Lost) -> float:
    return outcome.timing.seconds if isinstance(outcome, Reply) else outcome.seconds


def _late(outcome: Reply | Lost, deadline: float) -> Lost:
    """An outcome that the server did not wait for: it has paid for the download and knows at the deadline."""
    if isinstance(outcome, Lost):
        return replace(outcome, seconds=deadline)
    explanation = f"its answer would have come after {outcome.timing.seconds:.3g} s"
    return Lost(outcome.device, "late", explanation, deadline, outcome.timing.bytes_down)
