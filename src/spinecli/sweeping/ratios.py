"""The ratios of a sweep, as a person writes them: `0.1,0.2,0.35` or `0.1..0.5`."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from spinecli.errors import OptionError

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
