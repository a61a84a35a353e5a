"""Names beside the points of a plot, so that none covers another or a point."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

# Of a character, in sizes of the font; generous, because the font is the reader's.
_NARROW, _WIDE = 0.63, 1.05
_WIDE_LETTERS = frozenset("%@MWmw…—")
_LINE = 1.2
_CLOSE = 9.0
_RINGS = (0.0, 14.0, 30.0, 50.0, 75.0, 105.0, 140.0)
_DIRECTIONS = 16


@dataclass(frozen=True)
class Box:
    """A rectangle, in units of the drawing, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two have a point in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        """Whether all of it lies in `other`."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class PlacedText:
    """Lines of text where they have room."""

    lines: tuple[str, ...]
    box: Box
    anchor: str
    """start, middle or end, as SVG calls it."""
    apart: bool
    """So far from its point that a thin line leads there."""

    @property
    def x(self) -> float:
        """Where the lines are anchored."""
        middle = (self.box.left + self.box.right) / 2
        return {"start": self.box.left, "end": self.box.right}.get(self.anchor, middle)


def width_of(text: str, size: float) -> float:
    """What a line of text takes at most in a font of that size."""
    return size * sum(_WIDE if _is_wide(letter) else _NARROW for letter in text)


def _is_wide(letter: str) -> bool:
    return letter in _WIDE_LETTERS or unicodedata.east_asian_width(letter) in "WF"


def shortened(text: str, size: float, room: float) -> str:
    """The text, or its two ends around an ellipsis where it is wider than `room`."""
    if width_of(text, size) <= room:
        return text
    kept = len(text)
    while kept > 2 and width_of(text[:kept], size) > room - size:
        kept -= 1
    head = -(-kept // 2)
    return f"{text[:head]}…{text[len(text) - (kept - head) :]}"


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[tuple[str, ...]],
    room: Box,
    size: float,
    obstacles: Sequence[Box] = (),
) -> list[PlacedText | None]:
    """A place for every point's text as near to it as there is one; None where there is none, or no text.

    Args:
        room: what the labels stay within.
        size: of the font.
        obstacles: what they keep clear of besides.
    """
    taken = [*obstacles, *(Box(x - 6, y - 6, x + 6, y + 6) for x, y in points)]
    found: list[PlacedText | None] = []
    for point, lines in zip(points, texts, strict=True):
        if not lines:
            found.append(None)
            continue
        label = next((each for each in _places(point, lines, size) if _free(each.box, room, taken)), None)
        if label is not None:
            taken.append(label.box)
        found.append(label)
    return found


def _free(box: Box, room: Box, taken: Sequence[Box]) -> bool:
    return box.within(room) and not any(box.meets(other) for other in taken)


def _places(point: tuple[float, float], lines: tuple[str, ...], size: float) -> list[PlacedText]:
    """Candidates, the nearest first; on each ring to the right and to the left before above and below."""
    width, height = max(width_of(line, size) for line in lines), size * _LINE * len(lines)
    angles = sorted((turn / _DIRECTIONS * 2 * math.pi for turn in range(_DIRECTIONS)), key=_from_the_side)
    return [_at(point, angle, ring, width, height, lines) for ring, angle in product(_RINGS, angles)]


def _from_the_side(angle: float) -> tuple[float, float]:
    return (round(abs(math.sin(angle)), 6), -math.cos(angle))


def _at(
    point: tuple[float, float], angle: float, ring: float, width: float, height: float, lines: tuple[str, ...]
) -> PlacedText:
    x = point[0] + math.cos(angle) * (_CLOSE + ring)
    y = point[1] + math.sin(angle) * (_CLOSE + ring)
    across, down = math.cos(angle), math.sin(angle)
    anchor = "start" if across > 0.3 else "end" if across < -0.3 else "middle"
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    top = y - height * (0.5 - down / 2)
    return PlacedText(lines, Box(left, top, left + width, top + height), anchor, ring > 0)
