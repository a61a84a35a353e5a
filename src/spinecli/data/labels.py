"""Labels of any usual form (whole numbers, words, true and false) as indices into a sorted list of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spinecli.data.tables import Table
from spinecli.errors import DataError

# Not 007: leading zeros mean that the digits are a code and not a number.
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.0+)?")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_TRUTH = ("true", "false")
_LISTED = 10

_Value = int | str | bool


@dataclass(frozen=True)
class Labels:
    """The label column of a table."""

    names: tuple[str, ...]
    indices: tuple[int, ...]
    """Into `names`, one for each row."""
    note: str | None = None
    """Names labels that differ by case or blanks alone, if there are any."""


@dataclass(frozen=True)
class _Column:
    """The values of a column with where they stand."""

    table: Table
    name: str
    numbers: list[int]
    values: list[_Value]

    def place(self, index: int) -> str:
        """The row as an error message names it."""
        return self.table.place(self.numbers[index])


def read_labels(table: Table, column: str, known: Sequence[str] | None = None) -> Labels:
    """The labels of every row.

    Without `known`, the names are sorted: numbers by value, false before true, words by code point. Words that are all
    whole numbers (in a csv file everything is a word) count as numbers, and so do true and false.

    Args:
        known: names to map by, those of the training set.

    Raises: DataError if a label is missing, fractional, of another kind than the first, or not among `known`.
    """
    found = _Column(table, column, [], [])
    # one object a label instead of one a row
    same: dict[tuple[type, _Value], _Value] = {}
    written: dict[str, None] = {}
    for number, row in table:
        given = row.get(column)
        if isinstance(given, str):
            written[given] = None
        value = _checked(table.place, number, column, given)
        found.numbers.append(number)
        found.values.append(same.setdefault((type(value), value), value))
    _refuse_mixed(found)
    if known is not None:
        positions = {name: index for index, name in enumerate(known)}
        indices = tuple(_find(found, index, positions) for index in range(len(found.values)))
        return Labels(tuple(known), indices, _spelling_note(table, column, written))
    values = _converted(found)
    names = tuple(_name(value) for value in sorted(set(values), key=_order))
    positions = {name: index for index, name in enumerate(names)}
    return Labels(names, tuple(positions[_name(value)] for value in values), _spelling_note(table, column, written))


def _checked(place: Callable[[int], str], number: int, column: str, value: object) -> _Value:
    if isinstance(value, str):
        value = value.strip()
    # a number that differs from itself is NaN
    if value is None or value != value or (isinstance(value, str) and value.lower() in ("", "nan")):
        raise DataError(f"{place(number)} has no label in column {column!r}; fill it in or remove the row.")
    if isinstance(value, float):
        if not value.is_integer():
            raise _fraction(place(number), column)
        return int(value)
    if isinstance(value, (bool, int, str)):
        return value
    raise DataError(f"{place(number)} has a list or an object in column {column!r}; a label is a word or a number.")


def _fraction(place: str, column: str) -> DataError:
    return DataError(f"{place} has no whole number in column {column!r}, but labels are classes; name another column.")


def _refuse_mixed(column: _Column) -> None:
    kinds = {bool: "true or false", int: "a number", str: "text"}
    first = type(column.values[0])
    for index, value in enumerate(column.values):
        if type(value) is not first:
            raise DataError(
                f"{column.place(index)} has {kinds[type(value)]} in column {column.name!r} where the rows above have "
                f"{kinds[first]}; write all labels in the same way."
            )


def _spelling_note(table: Table, column: str, written: Iterable[str]) -> str | None:
    alike: dict[str, list[str]] = {}
    for label in written:
        alike.setdefault(" ".join(label.split()).casefold(), []).append(label)
    groups = [sorted(labels) for _, labels in sorted(alike.items()) if len(labels) > 1]
    if not groups:
        return None
    listed = "; ".join(" and ".join(map(repr, labels)) for labels in groups[:_LISTED])
    return (
        f"{table.reference} has labels in column {column!r} that differ by case or blanks alone: {listed}; blanks "
        "around a label do not count, and case does."
    )


def _converted(column: _Column) -> list[_Value]:
    """Words as the numbers or truth values that all of them are; other words, and all else, as they are."""
    words = {value for value in column.values if isinstance(value, str)}
    if not words:
        return column.values
    if all(word.lower() in _TRUTH for word in words):
        return [str(word).lower() == "true" for word in column.values]
    if all(map(_WHOLE.fullmatch, words)):
        return [_whole(str(word)) for word in column.values]
    if all(map(_NUMBER.fullmatch, words)) and any("." in word and not _WHOLE.fullmatch(word) for word in words):
        fractions = (index for index, word in enumerate(column.values) if not _WHOLE.fullmatch(str(word)))
        raise _fraction(column.place(next(fractions)), column.name)
    return column.values


def _whole(word: str) -> int:
    return int(word.partition(".")[0])


def _name(value: _Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _order(value: _Value) -> tuple[int, str]:
    return (0, value) if isinstance(value, str) else (int(value), "")


def _find(column: _Column, index: int, positions: dict[str, int]) -> int:
    value = column.values[index]
    name = _name(value)
    if name in positions:
        return positions[name]
    # a word of this file may be a number or a truth value of the training set's file
    if isinstance(value, str):
        other = str(_whole(value)) if _WHOLE.fullmatch(value) else value.lower() if value.lower() in _TRUTH else None
        if other in positions:
            return positions[other]
    listed = ", ".join(list(positions)[:_LISTED]) + (", ..." if len(positions) > _LISTED else "")
    raise DataError(
        f"{column.place(index)} has the label {name!r}, which the training set does not have; its labels are {listed}."
    )
