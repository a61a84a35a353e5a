"""Files and hub data sets as rows of named columns, each row with the place that an error message can name."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spinecli.errors import DataError, MissingPathError

JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".txt")

Row = Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """Rows of one file, or of one split of a hub data set."""

    reference: str
    """The file, or the data set as it was named."""
    columns: tuple[str, ...]
    """In the order in which they first occur."""
    rows: Sequence[Row]
    numbers: Sequence[int]
    """Where each row stands, counted from 1."""
    unit: Literal["line", "row"] = "line"

    def place(self, index: int) -> str:
        """The row as an error message names it, for example `train.csv line 7`."""
        return f"{self.reference} {self.unit} {self.numbers[index]}"


def read_file(path: Path) -> Table:
    """The rows of a `.csv`, `.tsv`, `.jsonl`, `.ndjson` or `.txt` file.

    Raises: MissingPathError; DataError if the file is of another kind, not UTF-8, broken at some line, or without rows.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is none of the files that hold examples: {', '.join(SUFFIXES)}; convert or rename it.")
    content = _read_text(path)
    if suffix in JSON_SUFFIXES:
        table = _read_json_lines(path, content)
    elif suffix == ".txt":
        table = _read_lines(path, content)
    else:
        table = _read_separated(path, content, "," if suffix == ".csv" else "\t")
    if not table.rows:
        raise DataError(f"{path} holds no examples; name another file.")
    return table


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingPathError(f"{path} does not exist; name a file or directory of examples.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    try:
        # spreadsheets put a byte order mark before the first column's name
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text at byte {error.start}; convert it first.") from error


def _read_json_lines(path: Path, content: str) -> Table:
    rows: list[Row] = []
    numbers: list[int] = []
    columns: dict[str, None] = {}
    # not splitlines: JSON strings may hold U+2028 and its like unescaped
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON; mend or remove the line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is no JSON object with named columns; mend or remove the line.")
        rows.append(row)
        numbers.append(number)
        columns.update(dict.fromkeys(row))
    return Table(str(path), tuple(columns), rows, numbers)


def _read_lines(path: Path, content: str) -> Table:
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    return Table(str(path), ("text",), [{"text": line} for _, line in lines], [number for number, _ in lines])


def _read_separated(path: Path, content: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    numbers: list[int] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not columns:
                columns = _header(path, fields)
                continue
            if len(fields) != len(columns):
                raise DataError(
                    f"{path} line {reader.line_num} has {len(fields)} fields where the header has {len(columns)}; "
                    "quote fields that hold separators, or mend the line."
                )
            rows.append(dict(zip(columns, fields, strict=True)))
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num} cannot be read ({error}); mend its quotes, or save the data as .jsonl."
        ) from error
    return Table(str(path), columns, rows, numbers)


def _header(path: Path, fields: list[str]) -> tuple[str, ...]:
    columns = tuple(field.strip() for field in fields)
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"{path} names the column {twice!r} twice in its first line; give each column its own name.")
    return columns
