"""Examples to train and evaluate on, whatever file they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spinecli.artifacts.manifest import FileRecord, Source
from spinecli.errors import DataError, MissingPathError, OptionError
from spinecli.federation.data.builtin import BUILTIN, builtin_table
from spinecli.federation.data.columns import Columns, DataOptions, Task, choose_columns
from spinecli.federation.data.directory import find_training
from spinecli.federation.data.hub import hub_name, read_hub
from spinecli.federation.data.labels import read_labels
from spinecli.federation.data.tables import Table, read_file


@dataclass(frozen=True)
class Example:
    """One thing to learn from."""

    text: str
    pair: str | None = None
    """The second text of a pair, or the input that an instruction works on."""
    label: int | None = None
    """Index into the data set's label names."""
    answer: str | None = None
    """What the model should say to the instruction `text`."""
    group: str | None = None
    """Whose example it is: a speaker, a user."""


@dataclass(frozen=True)
class Dataset:
    """Examples of one task, in the order of their file."""

    task: Task
    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    """Names of the classes; empty if the examples have none."""
    reference: str
    """As the user named it."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def subset(self, indices: Sequence[int]) -> Dataset:
        """These examples alone, with the same label names."""
        return replace(self, examples=tuple(self.examples[index] for index in indices))

    def source(self) -> Source:
        """These examples as an input of a step; the sum depends on their content, not on path or file format."""
        digest = hashlib.sha256()
        size = 0
        head = [self.task, list(self.labels)]
        body = ([one.text, one.pair, one.label, one.answer, one.group] for one in self.examples)
        for value in (head, *body):
            line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            digest.update(line)
            size += len(line)
        return Source(reference=self.reference, files={"examples": FileRecord(sha256=digest.hexdigest(), bytes=size)})


def load_dataset(reference: str, options: DataOptions | None = None, labels: Sequence[str] | None = None) -> Dataset:
    """The examples that `reference` names.

    A `.csv` or `.tsv` file with a header, a `.jsonl` or `.txt` file, a directory (its train file),
    `builtin:tiny-topics`, or a hub data set `owner/name[:split]` (train by default).

    Args:
        labels: names to map labels by; None takes those that the data set has.

    Raises: DataError, MissingPathError, OfflineError, OptionError.
    """
    options = options or DataOptions()
    if options.limit is not None and options.limit < 1:
        raise OptionError(f"--limit must be at least 1 example, not {options.limit}.")
    table = _read_table(reference)
    columns = choose_columns(table, options)
    found = read_labels(table, columns.label, labels) if columns.label else None
    names = found.names if found else ()
    if columns.task == "classification" and len(names) < 2:
        raise DataError(
            f"{table.reference} has only the label {names[0]!r} in column {columns.label!r}; "
            "classification needs at least two, so name another column or file."
        )
    examples = tuple(
        _example(table, index, columns, found.indices[index] if found else None) for index in range(len(table.rows))
    )
    if options.limit is not None and options.limit < len(examples):
        # evenly spread, because files are often sorted by label
        examples = tuple(examples[step * len(examples) // options.limit] for step in range(options.limit))
    return Dataset(columns.task, examples, names, reference)


def _read_table(reference: str) -> Table:
    if reference.startswith(BUILTIN):
        return builtin_table(reference)
    path = Path(reference).expanduser()
    if path.is_dir():
        return read_file(find_training(path))
    if path.exists():
        return read_file(path)
    if (hub := hub_name(reference)) is None:
        raise MissingPathError(
            f"{path} does not exist; name a file or directory of examples, {BUILTIN}tiny-topics, "
            "or a hub data set as owner/name."
        )
    return read_hub(hub[0], hub[1] or "train")


def _example(table: Table, index: int, columns: Columns, label: int | None) -> Example:
    text = _text(table, index, columns.text)
    pair = answer = None
    if columns.answer is not None:
        answer = _text(table, index, columns.answer)
    if columns.pair is not None:
        optional = columns.answer is not None and table.rows[index].get(columns.pair) in (None, "")
        pair = None if optional else _text(table, index, columns.pair)
    if columns.task == "classification":
        # many tokenizers make a trailing space a token, and a causal model's class is read off the last token
        text, pair = text.strip(), pair.strip() if pair else None
    group = _group(table, index, columns.group) if columns.group else None
    return Example(text, pair, label, answer, group)


def _text(table: Table, index: int, column: str) -> str:
    value = table.rows[index].get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{table.place(index)} has an empty text in column {column!r}; fill it in or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"{table.place(index)} has {value!r:.40} in column {column!r}, which is no text; mend the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{table.place(index)} has half a surrogate pair in column {column!r}, which is no character; mend the row."
        ) from error
    return value


def _group(table: Table, index: int, column: str) -> str:
    value = table.rows[index].get(column)
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise DataError(f"{table.place(index)} has no group in column {column!r}; fill it in or remove the row.")
