"""history.jsonl: one line a round, written as it happens, and cut back to the last finished round on resume."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from spinecli.artifacts.whole_file import whole_file
from spinecli.federation.engine import LossReason, Snapshot
from spinecli.federation.messages import Message

HISTORY_NAME = "history.jsonl"


class _Record(BaseModel):
    # a loss that has become NaN is written as a word, which JSON allows and reading turns back into a number
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class DeviceRecord(_Record):
    """One device in one round; seconds are the engine's."""

    device: str
    lost: LossReason | None = None
    explanation: str = ""
    download_seconds: float = 0.0
    compute_seconds: float = 0.0
    upload_seconds: float = 0.0
    waiting_seconds: float = 0.0
    """From its answer until the round was over."""
    bytes_down: int = 0
    bytes_up: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    ratio: float = 0.0
    """Pruning ratio after the round."""
    depth: int = 0
    """Blocks with LoRA."""
    rank: float = 0.0
    """Mean rank of the blocks with LoRA."""
    batch: int = 0
    """Rows an iteration in split training."""


class Measurement(_Record):
    """The global model on held-out data."""

    loss: float
    accuracy: float
    """Share of right labels; for a language model, of right next tokens."""


class IterationRecord(_Record):
    """One iteration of split training."""

    ended: float
    """When the server had its features, in seconds of the engine's clock."""
    rows: int
    """Of the features that came."""
    loss: float | None
    """Before the server's step; None if the iteration was dropped because a device was lost in it."""


class SplitRecord(_Record):
    """What split training adds to a round."""

    divergence: float
    """KL divergence of the labels in the merged batch from those of the fleet, in nats."""
    selected_divergence: float
    """The same before batches were refined."""
    feasible: bool
    """Whether the divergence keeps its limit."""
    predicted_seconds: float | None
    """Of an iteration; None while no device's pace is known."""
    probed_bytes: int = 0
    """What a first look at all devices took, before the first round was planned."""
    iterations: tuple[IterationRecord, ...] = ()


class RoundRecord(_Record):
    """One round."""

    round: int
    """Counted from 0."""
    began: float
    """Seconds of the engine's clock."""
    ended: float
    learning_rate: float
    evaluation: Measurement | None = None
    devices: tuple[DeviceRecord, ...]
    split: SplitRecord | None = None

    @property
    def seconds(self) -> float:
        """How long the round took."""
        return self.ended - self.began

    @property
    def bytes(self) -> int:
        """Traffic of the round, both ways."""
        probed = self.split.probed_bytes if self.split else 0
        return probed + sum(device.bytes_down + device.bytes_up for device in self.devices)

    @property
    def accepted(self) -> bool:
        """Whether the model could learn from this round: from a device's answer and, where it is split, in a step."""
        steps = self.split.iterations if self.split else ()
        answered = any(device.lost is None for device in self.devices)
        return answered and (not steps or any(step.loss is not None for step in steps))

    @property
    def idle_share(self) -> float:
        """Share of the round that its devices spent waiting, on average; a lost device does not count."""
        answered = [device for device in self.devices if device.lost is None]
        if not answered or self.seconds <= 0:
            return 0.0
        return sum(device.waiting_seconds for device in answered) / len(answered) / self.seconds

    @property
    def slowest(self) -> str | None:
        """The device whose answer came last; None if none came."""
        answered = [device for device in self.devices if device.lost is None]
        return min(answered, key=lambda device: device.waiting_seconds).device if answered else None


class History:
    """The rounds so far, in memory and in a file that grows by one line a round.

    Args:
        path: the file; None keeps nothing on disk.
        rounds: finished rounds to go on from; the file is cut back to them.
    """

    def __init__(self, path: Path | None, rounds: list[RoundRecord] | None = None) -> None:
        self._path = path
        self.rounds = list(rounds or [])
        if path is not None:
            # by renaming: a kill while the file is cut back must not lose rounds whose state is kept
            with whole_file(path) as part:
                part.write_text("".join(_line(record) for record in self.rounds), encoding="utf-8")

    def append(self, record: RoundRecord) -> None:
        """Add a round; it is on disk when this returns."""
        self.rounds.append(record)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(_line(record))
                handle.flush()
                os.fsync(handle.fileno())


def _line(record: RoundRecord) -> str:
    return record.model_dump_json() + "\n"


def read_history(path: Path) -> list[RoundRecord]:
    """The rounds in a history file; a line that a kill cut short ends it."""
    rounds = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        rounds.append(RoundRecord.model_validate_json(line))
    return rounds


_NAME = "rounds.safetensors"
_STRATEGY, _ENGINE = "strategy", "engine"


@dataclass(frozen=True, eq=False)
class RunState:
    """After `rounds` finished rounds."""

    rounds: int
    strategy: Snapshot
    engine: Snapshot

    def save(self, directory: Path) -> None:
        """Replace the saved state; a kill leaves the old one or the new one."""
        parts = {_STRATEGY: self.strategy, _ENGINE: self.engine}
        tensors = {f"{part}/{name}": value for part, each in parts.items() for name, value in each.tensors.items()}
        header: dict[str, JsonValue] = {"rounds": self.rounds, **{part: each.values for part, each in parts.items()}}
        with whole_file(directory / _NAME) as part:
            part.write_bytes(Message(header, tensors).pack())


def forget_state(directory: Path) -> None:
    """Let a resumed run begin with its first round."""
    (directory / _NAME).unlink(missing_ok=True)


def load_state(directory: Path) -> RunState | None:
    """The newest saved state; None before the first round. Raises MessageError if it is damaged."""
    path = directory / _NAME
    if not path.is_file():
        return None
    message = Message.unpack(path.read_bytes())
    rounds = message.header["rounds"]
    assert isinstance(rounds, int)
    return RunState(rounds, _part(message, _STRATEGY), _part(message, _ENGINE))


def _part(message: Message, part: str) -> Snapshot:
    values = message.header[part]
    assert isinstance(values, dict)
    prefix = f"{part}/"
    tensors = {name.removeprefix(prefix): value for name, value in message.tensors.items() if name.startswith(prefix)}
    return Snapshot(values, tensors)
