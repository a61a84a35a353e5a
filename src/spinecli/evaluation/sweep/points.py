"""The points of a sweep: a method with its widths, at a ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spinecli.errors import OptionError
from spinecli.pruning.config import Widths
from spinecli.pruning.methods import METHODS


@dataclass(frozen=True)
class MethodChoice:
    """A method, and which blocks may differ in width."""

    method: str
    widths: Widths | None = None
    """None: as `spine prune` takes them without --widths."""

    @property
    def name(self) -> str:
        """As on the command line: `spine`, or `spine:adaptive`."""
        return f"{self.method}:{self.widths.value}" if self.widths else self.method


@dataclass(frozen=True)
class SweepPoint:
    """One way to prune the model."""

    choice: MethodChoice
    sparsity: float

    @property
    def name(self) -> str:
        """Unique in a sweep, and fit for a directory: `spine-0.3`, `spine-adaptive-0.3`."""
        return f"{self.choice.name.replace(':', '-')}-{self.sparsity:.10g}"


def read_methods(names: Sequence[str]) -> tuple[MethodChoice, ...]:
    """The methods of these names, each once; OptionError if there is no such method."""
    found = dict.fromkeys(_choice(name) for name in names)
    if not found:
        raise OptionError(f"--methods names no method; choose some of {', '.join(METHODS)}.")
    return tuple(found)


def _choice(text: str) -> MethodChoice:
    method, colon, widths = text.partition(":")
    if method not in METHODS:
        raise OptionError(f"There is no method {method!r}; choose some of {', '.join(METHODS)} for --methods.")
    try:
        return MethodChoice(method, Widths(widths) if colon else None)
    except ValueError:
        known = " or ".join(f"{method}:{choice.value}" for choice in Widths)
        raise OptionError(f"--methods {text} names no such widths; write {method}, {known}.") from None
