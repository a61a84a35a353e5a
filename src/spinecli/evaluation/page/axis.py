"""One axis of a plot: the span that it shows, the values that it names, and where a value lies on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# From this ratio of the largest value to the smallest on, the low end would be flat on a linear axis.
_LOGARITHMIC_FROM = 3.0
_MARGIN = 0.08
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_DECADE = (1.0, 2.0, 3.0, 5.0, 7.0)
_MOST_TICKS = 7


@dataclass(frozen=True)
class Axis:
    """A span of values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis_of(values: Sequence[float], *, may_bend: bool = False) -> Axis:
    """The axis that shows finite values, of which there is at least one.

    Args:
        may_bend: logarithmic where the values span decades.
    """
    least, most = min(values), max(values)
    if may_bend and least > 0 and most / least >= _LOGARITHMIC_FROM:
        margin = (most / least) ** _MARGIN
        return _logarithmic(least / margin, most * margin)
    span = most - least or abs(most) * 0.2 or 1.0
    low, high = least - _MARGIN * span, most + _MARGIN * span
    # no negative end under values that have none
    low = max(low, 0.0) if least >= 0 else low
    step = _step(high - low)
    first = math.ceil(low / step - 1e-9)
    ticks = tuple(number * step for number in range(first, math.floor(high / step + 1e-9) + 1))
    return Axis(low, high, ticks)


def tick_texts(axis: Axis, *, percent: bool = False) -> tuple[str, ...]:
    """The ticks as a person reads them: all with as many decimals as tell them apart."""
    if percent:
        hundredfold = Axis(axis.low, axis.high, tuple(100 * tick for tick in axis.ticks))
        return tuple(f"{text}%" for text in tick_texts(hundredfold))
    if axis.logarithmic or len(axis.ticks) < 2:
        return tuple(f"{tick:,.4g}" if abs(tick) < 1e4 else f"{tick:,.0f}" for tick in axis.ticks)
    step = axis.ticks[1] - axis.ticks[0]
    decimals = next((count for count in range(9) if abs(round(step, count) - step) < 1e-6 * step), 9)
    return tuple(f"{tick:,.{decimals}f}" for tick in axis.ticks)


def _step(span: float) -> float:
    """The smallest round step that gives at most so many ticks."""
    magnitude = 10.0 ** math.floor(math.log10(span / _MOST_TICKS))
    return next(step * magnitude for step in _STEPS if span / (step * magnitude) <= _MOST_TICKS)


def _logarithmic(low: float, high: float) -> Axis:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in decades for digit in _DECADE]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) > _MOST_TICKS:
        powers = [10.0**power for power in decades if low <= 10.0**power <= high]
        every = -(-len(powers) // _MOST_TICKS)
        shown = powers[::every] if len(powers) > 2 else shown[:: -(-len(shown) // _MOST_TICKS)]
    return Axis(low, high, tuple(shown), logarithmic=True)
