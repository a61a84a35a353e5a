"""Labels of any usual form (whole numbers, words, true and false) as indices into a sorted list of names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spinecli.errors import DataError
from spinecli.federation.data.tables import Table

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


def read_labels(table: Table, column: str, known: Sequence[str] | None = None) -> Labels:
    """The labels of every row.

    Without `known`, the names are sorted: numbers by value, false before true, words by code point. Words that are all
    whole numbers (in a csv file everything is a word) count as numbers, and so do true and false.

    Args:
        known: names to map by, those of the training set.

    Raises: DataError if a label is missing, fractional, of another kind than the first, or not among `known`.
    """
    values = [_checked(table, index, column) for index in range(len(table.rows))]
    _refuse_mixed(table, column, values)
    if known is not None:
        positions = {name: index for index, name in enumerate(known)}
        return Labels(tuple(known), tuple(_find(table, index, value, positions) for index, value in enumerate(values)))
    values = _converted(table, column, values)
    names = tuple(_name(value) for value in sorted(set(values), key=_order))
    positions = {name: index for index, name in enumerate(names)}
    return Labels(names, tuple(positions[_name(value)] for value in values))


def _checked(table: Table, index: int, column: str) -> _Value:
    value = table.rows[index].get(column)
    if isinstance(value, str):
        value = value.strip()
    # a number that differs from itself is NaN
    if value is None or value != value or (isinstance(value, str) and value.lower() in ("", "nan")):
        raise DataError(f"{table.place(index)} has no label in column {column!r}; fill it in or remove the row.")
    if isinstance(value, float):
        if not value.is_integer():
            raise _fraction(table, index, column)
        return int(value)
    if isinstance(value, (bool, int, str)):
        return value
    raise DataError(
        f"{table.place(index)} has a list or an object in column {column!r}; a label is a word or a number."
    )


def _fraction(table: Table, index: int, column: str) -> DataError:
    return DataError(
        f"{table.place(index)} has no whole number in column {column!r}, but labels are classes; name another column."
    )


def _refuse_mixed(table: Table, column: str, values: Sequence[_Value]) -> None:
    kinds = {bool: "true or false", int: "a number", str: "text"}
    for index, value in enumerate(values):
        if type(value) is not type(values[0]):
            raise DataError(
                f"{table.place(index)} has {kinds[type(value)]} in column {column!r} where the rows above have "
                f"{kinds[type(values[0])]}; write all labels alike."
            )


def _converted(table: Table, column: str, values: list[_Value]) -> list[_Value]:
    """Words as the numbers or truth values that all of them are; other words, and all else, as they are."""
    words = [value for value in values if isinstance(value, str)]
    if not words:
        return values
    if all(word.lower() in _TRUTH for word in words):
        return [word.lower() == "true" for word in words]
    if all(map(_WHOLE.fullmatch, words)):
        return [_whole(word) for word in words]
    if all(map(_NUMBER.fullmatch, words)) and any("." in word and not _WHOLE.fullmatch(word) for word in words):
        raise _fraction(table, next(i for i, word in enumerate(words) if not _WHOLE.fullmatch(word)), column)
    return values


def _whole(word: str) -> int:
    return int(word.partition(".")[0])


def _name(value: _Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _order(value: _Value) -> tuple[int, str]:
    return (0, value) if isinstance(value, str) else (int(value), "")


def _find(table: Table, index: int, value: _Value, positions: dict[str, int]) -> int:
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
        f"{table.place(index)} has the label {name!r}, which the training set does not have; its labels are {listed}."
    )
