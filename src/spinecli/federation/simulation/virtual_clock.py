"""The clock of a simulated fleet: how long each message and each device's work would have taken on it.

A device's round is download, compute and upload, from its conditions in that round. The exchange ends when the last
answer is in or the deadline has come. The server's own work takes the time that its FLOPs take at the fleet's server
speed. Whoever carries the messages, in this process or over a network, comes to the same seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import JsonValue

from spinecli.federation.engine import Job, Lost, Reply, Timing
from spinecli.federation.messages import Message
from spinecli.federation.simulation.conditions import Conditions, conditions
from spinecli.federation.simulation.fleet import Fleet


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
