"""The ratios of a sweep as a person writes them: 0.1,0.2,0.35, a range 0.1..0.5, or both."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

DEFAULT_STEP = 0.1
_MOST = 100


def ratios_in(text: str, step: float | None = None) -> tuple[float, ...]:
    """The ratios that `text` names, rising, each once.

    Steps are counted in decimal numbers, so that 0.1..0.3 ends with 0.3 and not with 0.30000000000000004.

    Args:
        step: from one ratio of a range to the next, above 0; None takes 0.1.

    Raises: ValueError with what is wrong with `text`, as it goes on after the option's name.
    """
    stride = Decimal(str(DEFAULT_STEP if step is None else step))
    found: set[Decimal] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        found |= _range(_ratio(first, text), _ratio(last, text), stride) if dots else {_ratio(first, text)}
        _require_few(len(found))
    return tuple(float(ratio) for ratio in sorted(found))


def _range(first: Decimal, last: Decimal, stride: Decimal) -> set[Decimal]:
    if first > last:
        raise ValueError(f"{first}..{last} runs backwards; write {last}..{first}.")
    count = int((last - first) / stride) + 1
    _require_few(count)
    return {first + index * stride for index in range(count)}


def _require_few(count: int) -> None:
    if count > _MOST:
        raise ValueError(f"makes {count} ratios, more than {_MOST}; name fewer, or raise --step.")


def _ratio(text: str, whole: str) -> Decimal:
    try:
        ratio = Decimal(text.strip())
    except InvalidOperation:
        raise ValueError(
            f"{whole} holds {text.strip()!r}, which is not a number; write ratios as 0.1,0.2,0.3 or 0.1..0.5."
        ) from None
    if not (ratio.is_finite() and 0 < ratio < 1):
        raise ValueError(f"must lie between 0 and 1, not {text.strip()}.")
    return ratio.normalize()
