"""What a killed run goes on from: all that the finished rounds have left, in one file, replaced after each round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.whole_file import whole_file
from spinecli.federation.engine import Snapshot
from spinecli.federation.messages import Message

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
