"""How library code tells its caller how far it is: a callback, never a printed line."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each finished unit of work."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """`phase`: what is being done, as a short phrase; `done` of `total` units are finished."""


def silent(phase: str, done: int, total: int) -> None:
    """Report nothing."""
