"""Points with names, as geometry that a template draws: no script, no picture file, no optional package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from spinecli.evaluation.page.labels import Box, PlacedText, place_labels, shortened, width_of

# From this ratio of the largest value to the smallest on, the low end would be flat on a linear axis.
_LOGARITHMIC_FROM = 3.0
_MARGIN = 0.08
_LEAST_SPAN = 0.05
"""Of an axis, as a share of its largest value: less than that is no difference to draw as one."""
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
    span = max(most - least, abs(most) * _LEAST_SPAN) or 1.0
    middle = (least + most) / 2
    low, high = middle - (0.5 + _MARGIN) * span, middle + (0.5 + _MARGIN) * span
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


# From this many points on, a name has one line: the values are in the table.
_MOST_WITH_VALUES = 8
_FONT = 12.0


@dataclass(frozen=True)
class Point:
    """One model."""

    name: str
    x: float
    y: float
    said: str
    """The figures in words, seen on hover."""
    value: str = ""
    """The y value as a person reads it, below the name."""
    label: str = ""
    """What stands beside the point; empty: the name."""
    named: bool = True
    """Whether anything stands beside it."""
    series: int = 1
    """Colour and shape; 0 is the model that the others are compared with."""


@dataclass(frozen=True)
class Plot:
    """Points over two axes."""

    title: str
    x_title: str
    y_title: str
    points: tuple[Point, ...]
    series: tuple[str, ...] = ()
    """Names of the series, the first that of number 0. They are joined by lines; empty: nothing is joined or named."""
    x_percent: bool = False
    y_percent: bool = False
    """Whether the values are shares."""

    @property
    def drawn(self) -> tuple[Point, ...]:
        """The points that have a place."""
        return tuple(point for point in self.points if math.isfinite(point.x) and math.isfinite(point.y))

    @property
    def narrow(self) -> Drawing:
        """For a telephone."""
        return Drawing(self, 360, 340)

    @property
    def wide(self) -> Drawing:
        """For anything larger, and for paper."""
        return Drawing(self, 720, 400)


@dataclass(frozen=True)
class Mark:
    """A point in its place."""

    point: Point
    x: float
    y: float
    label: PlacedText | None


@dataclass(frozen=True)
class Tick:
    """A named value of an axis in its place."""

    place: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """A plot at one size, in units of which a screen shows one as a pixel or less."""

    plot: Plot
    width: int
    height: int
    font: ClassVar[float] = _FONT
    top: ClassVar[float] = 34.0
    below: ClassVar[float] = 44.0

    @property
    def left(self) -> float:
        """Where the y axis stands: right of its ticks."""
        texts = tick_texts(self._y, percent=self.plot.y_percent)
        return 10 + max((width_of(text, _FONT) for text in texts), default=0.0)

    @property
    def right(self) -> float:
        """Where the x axis ends."""
        return self.width - 12.0

    @property
    def bottom(self) -> float:
        """Where the x axis lies."""
        return self.height - self.below

    @property
    def x_ticks(self) -> tuple[Tick, ...]:
        """Left to right, as many as have room for their texts."""
        texts = tick_texts(self._x, percent=self.plot.x_percent)
        widest = max((width_of(text, _FONT) for text in texts), default=0.0) + _FONT
        every = max(1, math.ceil(widest * len(texts) / (self.right - self.left)))
        return tuple(
            Tick(self._across(tick), text) for tick, text in list(zip(self._x.ticks, texts, strict=True))[::every]
        )

    @property
    def y_ticks(self) -> tuple[Tick, ...]:
        """Bottom to top."""
        texts = tick_texts(self._y, percent=self.plot.y_percent)
        return tuple(Tick(self._down(tick), text) for tick, text in zip(self._y.ticks, texts, strict=True))

    @property
    def reference(self) -> float | None:
        """The height of the model that the others are compared with."""
        return next((self._down(point.y) for point in self.plot.drawn if point.series == 0), None)

    @property
    def lines(self) -> tuple[tuple[int, str], ...]:
        """By series, the path from the reference through its points."""
        first = [point for point in self.plot.drawn if point.series == 0]
        found = []
        for number in range(1, len(self.plot.series)):
            joined = [*first[:1], *(point for point in self.plot.drawn if point.series == number)]
            if len(joined) > 1:
                places = "L".join(f"{self._across(point.x):.1f} {self._down(point.y):.1f}" for point in joined)
                found.append((number, f"M{places}"))
        return tuple(found)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """All points with their labels."""
        points = self.plot.drawn
        places = [(self._across(point.x), self._down(point.y)) for point in points]
        room = Box(self.left + 2, self.top - 4, self.width - 2.0, self.bottom - 2)
        level = () if self.reference is None else (Box(self.left, self.reference, self.right, self.reference + 1),)
        labels = place_labels(places, [self._lines_of(point) for point in points], room, _FONT, level)
        return tuple(Mark(point, *place, label) for point, place, label in zip(points, places, labels, strict=True))

    @property
    def unnamed(self) -> tuple[str, ...]:
        """Models whose name found no room, and those that have no place on the axes."""
        crowded = tuple(mark.point.name for mark in self.marks if mark.label is None and mark.point.named)
        return crowded + tuple(point.name for point in self.plot.points if point not in self.plot.drawn)

    @property
    def _x(self) -> Axis:
        return axis_of([point.x for point in self.plot.drawn] or [0.0])

    @property
    def _y(self) -> Axis:
        return axis_of([point.y for point in self.plot.drawn] or [0.0], may_bend=not self.plot.y_percent)

    def _across(self, value: float) -> float:
        return self.left + self._x.share(value) * (self.right - self.left)

    def _down(self, value: float) -> float:
        return self.bottom - self._y.share(value) * (self.bottom - self.top)

    def _lines_of(self, point: Point) -> tuple[str, ...]:
        if not point.named:
            return ()
        name = shortened(point.label or point.name, _FONT, 0.42 * (self.right - self.left))
        with_value = point.value and len(self.plot.points) <= _MOST_WITH_VALUES
        return (name, point.value) if with_value else (name,)
