"""The loop over rounds, whatever they train: play, measure, record, save, up to the target accuracy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from spinecli.artifacts.stopwatch import return_freed_memory
from spinecli.errors import FederationError
from spinecli.federation.config import FederateConfig, Schedule
from spinecli.federation.engine import Engine, Snapshot
from spinecli.federation.history import History, Measurement, RoundRecord, RunState
from spinecli.federation.results import ClassResult


def learning_rate(base: float, schedule: Schedule, round_number: int, rounds: int) -> float:
    """The rate in a round counted from 0: constant, or falling from `base` to a tenth of it after the last round."""
    done = round_number / rounds
    share = {"constant": 1.0, "linear": 1 - 0.9 * done, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * done))}
    return base * share[schedule]


_LOG = logging.getLogger(__name__)
_MOST_NAMED = 5


class Listener(Protocol):
    """Hears of every finished round."""

    def __call__(self, record: RoundRecord, /) -> None:
        """`record` is in the history and the state is saved."""


@dataclass(frozen=True)
class RoundStart:
    """What a round starts from."""

    number: int
    """Counted from 0."""
    rounds: int
    """Of the whole run."""
    learning_rate: float
    acknowledged: Mapping[str, int]
    """The last round whose answer was accepted, of every device that has had one."""

    def diverged(self, what: str) -> FederationError:
        """The end of a run whose numbers have left the finite range in this round.

        Args:
            what: the numbers, and whose they are.
        """
        return FederationError(
            f"The model has diverged in round {self.number + 1} of {self.rounds}: {what}; nothing is published and the "
            "rounds before are kept, so --resume tries this one again, or start over with --overwrite and a lower "
            "--learning-rate."
        )


_Made = TypeVar("_Made", covariant=True)


class Training(Protocol[_Made]):
    """What a round is, and what it leaves behind."""

    @property
    def engine(self) -> Engine:
        """Where the devices are."""

    @property
    def model(self) -> _Made:
        """What the rounds so far have made."""

    def play(self, start: RoundStart) -> RoundRecord:
        """One round, which nobody has measured yet.

        Raises: FederationError if what the answers have led to gives no finite numbers.
        """

    def snapshot(self) -> Snapshot:
        """What `restore` needs to go on from here."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""


Model = TypeVar("Model")


class ReadyFederation(Protocol[Model]):
    """A run that is ready to begin: its rounds, and what is made of what they have trained."""

    @property
    def training(self) -> Training[Model]:
        """Its rounds."""

    def evaluate(self, model: Model) -> Measurement:
        """The model on what is held out."""

    def probe(self, model: Model) -> Measurement:
        """The same on the first few rows."""

    def write(self, directory: Path) -> Sequence[ClassResult]:
        """Write what has been trained; what each group of devices would run, where that differs."""


@dataclass(frozen=True, eq=False)
class Loop(Generic[Model]):
    """Everything that a run of rounds needs."""

    config: FederateConfig
    training: Training[Model]
    evaluate: Callable[[Model], Measurement]
    save: Callable[[RunState], None]
    probe: Callable[[Model], Measurement] | None = None
    """Measures on a few rows, in rounds that are not evaluated, whether the model still gives numbers."""

    def run(self, history: History, listener: Listener) -> None:
        """Run what rounds are left after those in the history, up to the target accuracy.

        Every device whose answer is refused is named in a note when that happens for the first time.

        Raises: FederationError if a device would be asked for more than its memory holds, or if what a round has led
        to gives no finite numbers; the state saved is then that of the round before.
        """
        train, refused = self.config.train, set[str]()
        acknowledged: dict[str, int] = {}
        for record in history.rounds:
            acknowledged |= dict.fromkeys(_answered(record), record.round)
        for number in range(len(history.rounds), train.rounds):
            if _reached_target(history.rounds, train.target_accuracy):
                return
            rate = learning_rate(self.config.learning_rate, train.schedule, number, train.rounds)
            start = RoundStart(number, train.rounds, rate, acknowledged)
            played = self.training.play(start)
            record = played.model_copy(update={"evaluation": self._measured(start, _answered(played))})
            acknowledged = acknowledged | dict.fromkeys(_answered(record), number)
            history.append(record)
            self.save(RunState(number + 1, self.training.snapshot(), self.training.engine.snapshot()))
            return_freed_memory()
            for device in record.devices:
                if device.lost == "refused" and device.device not in refused:
                    refused.add(device.device)
                    _LOG.warning("round %d goes on without %s: %s", number + 1, device.device, device.explanation)
            listener(record)

    def _measured(self, start: RoundStart, answered: Sequence[str]) -> Measurement | None:
        """What is measured of the model where that is due; in other rounds only that a few rows give numbers.

        Args:
            answered: devices that the model has learned from in this round.

        Raises: FederationError if its loss is no finite number.
        """
        due = self.config.train.evaluates(start.number)
        look = self.evaluate if due else self.probe
        found = None if look is None else look(self.training.model)
        if found is not None and not math.isfinite(found.loss):
            raise start.diverged(f"its loss on held-out data is {found.loss}, after {named(answered)}")
        return found if due else None


def _answered(record: RoundRecord) -> list[str]:
    return [device.device for device in record.devices if device.lost is None]


def named(devices: Sequence[str]) -> str:
    """Devices in a sentence: the first few by name."""
    shown, more = list(devices[:_MOST_NAMED]), len(devices) - _MOST_NAMED
    parts = [*shown, f"{more} others"] if more > 0 else shown
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "no device"


def _reached_target(rounds: Sequence[RoundRecord], target: float | None) -> bool:
    """Whether the last round was measured at `target` or above."""
    last = rounds[-1].evaluation if rounds else None
    return target is not None and last is not None and last.accuracy >= target
