"""What a sweep varies beside the ratio: the method with its widths, and what recovers a cut."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spinecli.errors import OptionError
from spinecli.masktuning.recovery import TuneMethod
from spinecli.pruning.method import Method
from spinecli.pruning.methods import METHODS
from spinecli.pruning.request import Widths


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


class Tuning(str, Enum):
    """What follows a cut."""

    none = "none"
    """Nothing."""
    auto = "auto"
    """`spine tune --method auto` after methods that leave the kept weights as they were; nothing after the others."""
    mask = "mask"
    """`spine tune --method mask` after every method."""
    lsq = "lsq"
    """`spine tune --method lsq` after every method."""

    def after(self, method: Method) -> TuneMethod | None:
        """How a cut by `method` is tuned; None if it is not."""
        if self is Tuning.none or (self is Tuning.auto and method.refits):
            return None
        return TuneMethod(self.value)


def parse_methods(text: str) -> tuple[MethodChoice, ...]:
    """The methods that `text` names, separated by commas, each once; OptionError if there is no such method."""
    found = dict.fromkeys(_choice(part.strip()) for part in text.split(",") if part.strip())
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
