"""What long work is given beside its task: who hears of it, what counts its time, and where its state is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spinecli.artifacts.stopwatch import Stopwatch

if TYPE_CHECKING:
    from spinecli.artifacts.journal import PassJournal


class Progress(Protocol):
    """Called after each finished unit of work."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """`phase`: what is being done, as a short phrase; `done` of `total` units are finished."""


def silent(phase: str, done: int, total: int) -> None:
    """Report nothing."""


def unheard(told: object) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class RunContext:
    """One for each run, whose time its stopwatch counts from the beginning; nobody hears of it unless told so."""

    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    progress: Progress = silent
    note: Callable[[str], None] = unheard
    """Hears sentences about what is not as one would expect."""
    debug: bool = False
    """Let third-party libraries write to the terminal."""
    state: Path | None = None
    """Directory for the journals of passes; None keeps none."""

    def journal(self, name: str) -> PassJournal | None:
        """Where the pass called `name` saves its state and resumes from it."""
        from spinecli.artifacts.journal import PassJournal

        return PassJournal(self.state, name) if self.state else None
