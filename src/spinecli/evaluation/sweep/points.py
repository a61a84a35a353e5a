"""The points of a sweep as a command line names them: sparsities, methods with their widths, what follows a cut."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import Enum

from spinecli.errors import OptionError
from spinecli.pruning.config import TuneMethod, Widths
from spinecli.pruning.method import Method
from spinecli.pruning.methods import METHODS

DEFAULT_STEP = 0.1
_MOST_RATIOS = 100
_FORMS = "write ratios as 0.1,0.2,0.3 or 0.1..0.5"


def parse_ratios(text: str, step: float | None = None) -> tuple[float, ...]:
    """The ratios that `text` names, rising, each once.

    Steps are counted in decimal numbers, so that 0.1..0.3 ends with 0.3 and not with 0.30000000000000004.

    Args:
        step: from one ratio of a range to the next; None takes 0.1.

    Raises: OptionError.
    """
    if ".." not in text and step is not None:
        raise OptionError(f"--step belongs to a range such as 0.1..0.5, and --sparsity {text} has none.")
    stride = Decimal(str(DEFAULT_STEP if step is None else step))
    if not stride.is_finite() or stride <= 0:
        raise OptionError(f"--step must be above 0, not {step:g}.")
    found: set[Decimal] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        found |= _range(_ratio(first, text), _ratio(last, text), stride) if dots else {_ratio(first, text)}
    if len(found) > _MOST_RATIOS:
        raise OptionError(f"--sparsity {text} names {len(found)} ratios, more than {_MOST_RATIOS}; raise --step.")
    return tuple(float(ratio) for ratio in sorted(found))


def _range(first: Decimal, last: Decimal, stride: Decimal) -> set[Decimal]:
    if first > last:
        raise OptionError(f"--sparsity {first}..{last} runs backwards; write {last}..{first}.")
    count = int((last - first) / stride) + 1
    if count > _MOST_RATIOS:
        raise OptionError(f"--sparsity {first}..{last} names {count} ratios, more than {_MOST_RATIOS}; raise --step.")
    return {first + index * stride for index in range(count)}


def _ratio(text: str, whole: str) -> Decimal:
    try:
        ratio = Decimal(text.strip())
    except InvalidOperation:
        raise OptionError(f"--sparsity {whole} holds {text.strip()!r}, which is no number; {_FORMS}.") from None
    if not (ratio.is_finite() and 0 < ratio < 1):
        raise OptionError(f"--sparsity must lie between 0 and 1, not {text.strip()}.")
    return ratio.normalize()


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


class AfterCut(str, Enum):
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
        if self is AfterCut.none or (self is AfterCut.auto and method.refits):
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
