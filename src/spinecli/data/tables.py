"""Files as rows of named columns, each row with the place that an error message can name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spinecli.data.columns import CONVERSATIONS, recognised, text_columns
from spinecli.data.conversations import is_conversation
from spinecli.data.files import COMPRESSIONS, kind_of, open_bytes, open_text, read_text, refuse_binary
from spinecli.errors import DataError, reason_of

LINE_KINDS = (".txt", ".md")
ROW_KINDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".parquet")
KINDS = (*ROW_KINDS, *LINE_KINDS)
SUFFIXES = (*KINDS, *(kind + compression for kind in KINDS for compression in COMPRESSIONS))

Row = Mapping[str, object]
Numbered = tuple[int, Row]

_SEPARATORS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}
_EXCEL_SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*')
_CHUNK = 1000


@dataclass(frozen=True)
class Table:
    """Rows of one file, or of one split of a hub data set."""

    reference: str
    """The file, or the data set as it was named."""
    columns: tuple[str, ...]
    """In the order in which they first occur."""
    rows: Callable[[], Iterator[Numbered]]
    """Reads the rows from the first on, each with its number, counted from 1. Only one is held at a time."""
    unit: Literal["line", "row"] = "line"
    separator: str | None = None
    """Between the fields of a line, if there are such."""

    def __iter__(self) -> Iterator[Numbered]:
        """Every row with its number."""
        return self.rows()

    def place(self, number: int) -> str:
        """The row as an error message names it, for example `train.csv line 7`."""
        return f"{self.reference} {self.unit} {number}"

    @property
    def wrong_separator(self) -> str | None:
        """What to say of a header that another character divides better; None if none does."""
        if self.separator is None:
            return None
        header = "".join(self.columns)
        other = max((one for one in _SEPARATORS if one != self.separator), key=header.count)
        if header.count(other) < len(self.columns):
            return None
        return (
            f"{self.reference} looks separated by {_SEPARATORS[other]} and its first line also holds "
            f"{_SEPARATORS[self.separator]}; quote the names that hold separators, or save it with one of them alone."
        )


def read_table(path: Path) -> Table:
    """The rows of a file: `.csv` and `.tsv` with a header, `.jsonl`, `.json`, `.parquet`, or a row a line of `.txt`.

    Raises: MissingPathError; DataError if the file is of another kind, not text, broken at some line, or without rows.
        What is broken behind the first row may be found only when it is read.
    """
    kind = kind_of(path)
    if kind not in KINDS:
        if path.is_file():
            refuse_binary(path)
        raise DataError(
            f"{path} is not one of the file types that hold examples: {', '.join(KINDS)}; convert or rename it."
        )
    if kind in (".csv", ".tsv"):
        table = _separated(path, "," if kind == ".csv" else "\t")
    elif kind in LINE_KINDS:
        table = Table(str(path), ("text",), lambda: _lines(path))
    elif kind == ".parquet":
        table = _parquet(path)
    else:
        whole = _json_array(path) if kind == ".json" or _begins_with_bracket(path) else None
        table = whole or _from_rows(str(path), lambda: _json_lines(path), "line")
    if next(iter(table), None) is None:
        raise DataError(f"{path} holds no examples; name another file.")
    return table


def _from_rows(reference: str, rows: Callable[[], Iterator[Numbered]], unit: Literal["line", "row"]) -> Table:
    columns: dict[str, None] = {}
    for _, row in rows():
        columns.update(dict.fromkeys(row))
    return Table(reference, tuple(columns), rows, unit)


def _lines(path: Path) -> Iterator[Numbered]:
    # not at every line separator of Unicode, and a carriage return inside a line is a character of it
    with open_text(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, {"text": line.removesuffix("\n").rstrip("\r")}


def _json_lines(path: Path) -> Iterator[Numbered]:
    # JSON strings may hold U+2028 and its like unescaped, so lines end at newlines alone
    with open_text(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _row(json.loads(line.strip().removesuffix(",")))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number} is not JSON; fix or remove the line.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is not a JSON object with text columns; fix or remove the line.")
            yield number, row


def _begins_with_bracket(path: Path) -> bool:
    with open_text(path) as text:
        return text.read(_CHUNK).lstrip().startswith("[")


def _json_array(path: Path) -> Table | None:
    """The rows of one JSON value; None if the file has to be read line by line, also to say what is wrong with it."""
    text = read_text(path)
    if not text.strip():
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and kind_of(path) == ".json" and not _first_line_is_object(path):
            raise DataError(f"{path} is not JSON at line {error.lineno} ({error.msg}); fix it there.") from error
        return None
    rows = _object_rows(path, found) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a single JSON value and no array of objects; save its rows as .jsonl.")
    rows = [_row(rows)] if is_conversation(rows) else [_row(row) for row in rows]
    if kind_of(path) != ".json" and not _holds_rows(rows):
        return None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number} is not a JSON object with text columns; fix or remove the row.")
    return _from_rows(str(path), lambda: iter(enumerate(rows, start=1)), "row")


def _object_rows(path: Path, found: dict[str, Any]) -> list[Any]:
    """The rows of an object: of the one array that it holds, or in one of pandas' layouts, or the object as a row."""
    arrays = {name: value for name, value in found.items() if name not in CONVERSATIONS and _holds_rows(value)}
    if len(arrays) > 1:
        raise DataError(f"{path} holds the arrays {', '.join(arrays)}; save the one with the examples as .jsonl.")
    if arrays:
        return next(iter(arrays.values()))
    rows = _pandas_rows(path, found)
    return [found] if rows is None else rows


def _pandas_rows(path: Path, found: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of an object as pandas writes a table with its `orient` columns, index, split or list; else None."""
    values = list(found.values())
    if {"columns", "data"} <= found.keys():
        columns, lines = found["columns"], found["data"]
        names = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
        if not (names and _lists_of_length(lines, len(columns)) and found.keys() <= {"columns", "index", "data"}):
            return None
        _refuse_twice(path, columns, "columns")
        return [dict(zip(columns, line, strict=True)) for line in lines]
    columnar = bool(values) and isinstance(values[0], list) and _lists_of_length(values, len(values[0]))
    # messages in an array of their own are one conversation
    if columnar and not any(_holds_rows(value) for value in values):
        return [dict(zip(found, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) for value in values):
        keys, inner = tuple(found), tuple(values[0])
        if _are_columns(inner, keys):
            return values
        if _are_columns(keys, inner) and all(value.keys() == values[0].keys() for value in values):
            return [{name: value[row] for name, value in found.items()} for row in inner]
    return None


def _lists_of_length(values: object, length: int) -> bool:
    return isinstance(values, list) and all(isinstance(value, list) and len(value) == length for value in values)


def _are_columns(keys: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether of the two `keys` name the columns of a table and `others` its rows, mostly by numbers."""
    counted, others_counted = (all(key.lstrip("-").isdecimal() for key in one) for one in (keys, others))
    if counted or others_counted:
        return not counted
    named, others_named = (
        bool(text_columns(one)) or recognised(one, CONVERSATIONS) is not None for one in (keys, others)
    )
    return named and not others_named


def _row(value: Any) -> Any:
    """A conversation without an object around it as the row that it is; any other value as it is."""
    return {CONVERSATIONS[0]: value} if is_conversation(value) else value


def _holds_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _first_line_is_object(path: Path) -> bool:
    with open_text(path, newline="\n") as lines:
        line = next((line for line in lines if line.strip()), "")
    try:
        return isinstance(json.loads(line.strip().removesuffix(",")), dict)
    except (ValueError, RecursionError):
        return False


def _parquet(path: Path) -> Table:
    with _parquet_file(path) as file:
        columns = tuple(file.schema_arrow.names)
    _refuse_twice(path, columns, "schema")

    def rows() -> Iterator[Numbered]:
        with _parquet_file(path) as file:
            batches = file.iter_batches(_CHUNK)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)

    return Table(str(path), columns, rows, "row")


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(path) as content, pyarrow.PythonFile(content, mode="r") as file:
            yield parquet.ParquetFile(file)
    except (pyarrow.ArrowException, UnicodeError) as error:
        reason = reason_of(error)
        raise DataError(
            f"{path} cannot be read as parquet ({reason}); fetch it again, or convert it to .jsonl or .csv."
        ) from error


def _separated(path: Path, usual: str) -> Table:
    separator, named = _separator(path, usual)
    columns: tuple[str, ...] = ()
    for _, fields in _fields(path, separator, named):
        columns = _header(path, fields)
        break

    def rows() -> Iterator[Numbered]:
        for number, fields in islice(_fields(path, separator, named), 1, None):
            if len(fields) != len(columns):
                raise DataError(
                    f"{path} line {number} has {len(fields)} fields where the header has {len(columns)}; "
                    "quote fields that hold separators, or fix the line."
                )
            yield number, dict(zip(columns, fields, strict=True))

    return Table(str(path), columns, rows, separator=separator)


def _separator(path: Path, usual: str) -> tuple[str, bool]:
    """What divides the fields of a file, and whether a line before the header says so, as Excel writes it."""
    with open_text(path, newline="") as lines:
        header = next((line for line in lines if line.strip("\r\n")), "")
    if named := _EXCEL_SEPARATOR.fullmatch(header):
        return named[1], True
    outside = re.sub(r'"[^"]*("|$)', "", header)
    found = max(_SEPARATORS, key=outside.count)
    return (usual if usual in outside or found not in outside else found), False


def _fields(path: Path, separator: str, named: bool) -> Iterator[tuple[int, list[str]]]:
    """Every row that is not empty, the header first, with the line that it ends on."""
    with open_text(path, newline="") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        if named:
            next(line for line in reader if line)
        while True:
            try:
                with _fields_of_any_length():
                    chunk = [(reader.line_num, fields) for fields in islice(reader, _CHUNK)]
            except csv.Error as error:
                raise DataError(
                    f"{path} line {reader.line_num} cannot be read ({error}); fix its quotes, or save the data as "
                    ".jsonl."
                ) from error
            if not chunk:
                return
            yield from (row for row in chunk if row[1])


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """The csv module has one limit for the whole process, so it is put back before anybody else reads."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, fields: Sequence[str]) -> tuple[str, ...]:
    columns = tuple(field.strip() or f"column {place}" for place, field in enumerate(fields, start=1))
    _refuse_twice(path, columns, "first line")
    return columns


def _refuse_twice(path: Path, columns: Sequence[str], place: str) -> None:
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"{path} names the column {twice!r} twice in its {place}; give each column its own name.")
