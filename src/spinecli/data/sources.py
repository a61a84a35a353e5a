"""Where calibration text comes from: several sources with weights, and how their rows are dealt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from spinecli.errors import OptionError

SELF = "self"
"""Names the text that the model itself writes; a file of that name is `./self`."""
_NUMBER_BEGINS = "0123456789.+-"


@dataclass(frozen=True)
class TextSource:
    """One word of `--calibration`."""

    reference: str
    """A file, a hub data set, a built-in text, or `self`."""
    weight: float = 1.0
    """Its share of the rows, relative to the other sources'."""


def read_sources(words: Sequence[str], option: str = "--calibration") -> tuple[TextSource, ...]:
    """The sources that words such as `wiki.txt`, `chat.jsonl:0.3` and `self:0.5` name.

    The weight stands behind the last colon. A path that exists with its colon has none, nor has a name whose end is no
    number, such as a hub data set with its split.

    Args:
        option: the one that names them, as an error names it.

    Raises: OptionError for a weight that is none, and for a source that is named twice.
    """
    if not words:
        raise OptionError(f"{option} names no text; name one, or leave it out.")
    sources = tuple(_read(word, option) for word in words)
    places = Counter(_place(source.reference) for source in sources)
    for source in sources:
        if places[_place(source.reference)] > 1:
            raise OptionError(
                f"{option} names {source.reference} more than once; name it once, with a weight such as "
                f"{source.reference}:2."
            )
    return sources


def _read(word: str, option: str) -> TextSource:
    name, colon, end = word.rpartition(":")
    if not word.strip() or (colon and not name):
        raise OptionError(f"{option} {word!r} names no text; write a text, or a text and its weight as text:0.5.")
    if not colon or Path(word).expanduser().exists():
        return TextSource(word)
    try:
        weight = float(end)
    except ValueError:
        if end and end[0] in _NUMBER_BEGINS and not Path(end).suffix[1:].isalpha():
            raise OptionError(
                f"{option} {word} has the weight {end}, which is no number; write it as {name}:0.5."
            ) from None
        return TextSource(word)
    if not (math.isfinite(weight) and weight > 0):
        raise OptionError(f"{option} {word} has the weight {end}; a weight is a number above 0.")
    return TextSource(name, weight)


def _place(reference: str) -> str:
    """What makes two references the same source."""
    path = Path(reference).expanduser()
    return str(path.resolve()) if reference != SELF and path.exists() else reference


def kind_names(sources: Sequence[TextSource]) -> tuple[str, ...]:
    """What a person calls the text of each source: a file by its name, or by its path where files share a name."""
    short = [_short(source.reference) for source in sources]
    shared = {name for name, count in Counter(short).items() if count > 1}
    return tuple(source.reference if name in shared else name for source, name in zip(sources, short, strict=True))


def _short(reference: str) -> str:
    path = Path(reference).expanduser()
    return path.name if reference != SELF and path.is_file() else reference


def deal(weights: Sequence[float], rows: int) -> list[int]:
    """The number of the source that each row comes from; none from one of weight 0.

    Of the first n rows, every source has n times its share, to within less than one row, and so every stretch of rows
    holds all sources, to within less than two. This is Tijdeman's algorithm (The chairman assignment problem, Discrete
    Mathematics 32, 1980). Giving each row to the source that lags most behind is simpler, and is off by more than a row
    where many weights differ. Whole fractions keep the order the same on every machine.
    """
    whole = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(whole) for weight in whole]
    slack = Fraction(1, max(2, 2 * sum(share > 0 for share in shares) - 2))
    had, dealt = [0] * len(shares), []
    for row in range(1, rows + 1):
        lags = [row * share - count for share, count in zip(shares, had, strict=True)]
        # the one whose lag would be the first to reach 1 - slack
        due = [number for number, lag in enumerate(lags) if lag >= slack]
        chosen = min(due, key=lambda number: (1 - slack - lags[number]) / shares[number])
        had[chosen] += 1
        dealt.append(chosen)
    return dealt


def shared_out(weights: Sequence[float], rows: int, available: Sequence[int]) -> list[int]:
    """How many rows each source gives if it has no more than `available`; the others fill up what one lacks."""
    given = [0] * len(weights)
    while left := rows - sum(given):
        open_ = [number for number, count in enumerate(available) if given[number] < count]
        if not open_:
            break
        for number, count in Counter(deal([weights[each] for each in open_], left)).items():
            source = open_[number]
            given[source] = min(given[source] + count, available[source])
    return given
