"""Examples to train and evaluate on, whatever file they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spinecli.artifacts.manifest import FileRecord, Source
from spinecli.data.config import ExamplesConfig, Task
from spinecli.data.conversations import Conversation, read_conversation
from spinecli.data.example_columns import Columns, GroupColumn, choose_columns
from spinecli.data.hub import hub_name, read_hub
from spinecli.data.labels import read_labels
from spinecli.data.tables import KINDS, SUFFIXES, Row, Table, read_table
from spinecli.errors import DataError, MissingPathError

BUILTIN = "builtin:"
TOPICS = f"{BUILTIN}tiny-topics"
TOPICS_VALIDATION = f"{TOPICS}-validation"

# (examples, seed): made on demand, with seeds that neither the built-in model nor any other built-in text was made from
_STORIES = {TOPICS: (4000, 800_003), TOPICS_VALIDATION: (500, 800_004)}


def builtin_table(reference: str) -> Table:
    """Stories labelled with the topic of the place they begin at, which has to be told from what happens in them.

    Raises: DataError if there is no data set of that name.
    """
    from spinecli.demo import vocabulary
    from spinecli.demo.language import labelled

    if reference not in _STORIES:
        raise DataError(f"There is no data set {reference}; the built-in ones are {' and '.join(_STORIES)}.")
    rows = [{"text": story.text, "label": vocabulary.TOPICS[story.label]} for story in labelled(*_STORIES[reference])]
    return Table(reference, ("text", "label"), lambda: iter(enumerate(rows, start=1)), unit="row")


_TRAINING = ("train",)
# a test set is looked at last, so validation comes first
_EVALUATION = ("validation", "valid", "dev", "val", "test")


def find_training(directory: Path) -> Path:
    """The training file of `directory`; DataError if there is none, or more than one."""
    path = _find(directory, _TRAINING)
    if path is None:
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{directory} has none of {', '.join(f'train{suffix}' for suffix in KINDS)} but {held}; "
            "rename its training file or name it directly."
        )
    return path


def find_evaluation(directory: Path) -> Path | None:
    """The file of `directory` to evaluate on, or None; DataError if its split has more than one file."""
    return _find(directory, _EVALUATION)


def evaluation_split(splits: Iterable[str]) -> str | None:
    """The one of a hub data set's splits to evaluate on, or None."""
    present = set(splits)
    return next((name for name in _EVALUATION if name in present), None)


def _find(directory: Path, names: tuple[str, ...]) -> Path | None:
    for name in names:
        found = [path for suffix in SUFFIXES if (path := directory / f"{name}{suffix}").is_file()]
        if len(found) > 1:
            listed = " and ".join(path.name for path in found)
            raise DataError(f"{directory} has {listed}, of which only one can be meant; name the file itself.")
        if found:
            return found[0]
    return None


@dataclass(frozen=True, slots=True)
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
    conversation: Conversation = ()
    """Everything that was said before `answer`; `text` is the last of it."""


@dataclass(frozen=True)
class Dataset:
    """Examples of one task, in the order of their file."""

    task: Task
    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    """Names of the classes; empty if the examples have none."""
    reference: str
    """As the user named it."""
    notes: tuple[str, ...] = ()
    """What a person should hear of these data."""

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
        body = (_summed(one) for one in self.examples)
        for value in (head, *body):
            line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            digest.update(line)
            size += len(line)
        return Source(reference=self.reference, files={"examples": FileRecord(sha256=digest.hexdigest(), bytes=size)})


def _summed(example: Example) -> list[object]:
    fields: list[object] = [example.text, example.pair, example.label, example.answer, example.group]
    return [*fields, [[turn.role, turn.content] for turn in example.conversation]] if example.conversation else fields


def load_dataset(
    reference: str,
    config: ExamplesConfig | None = None,
    labels: Sequence[str] | None = None,
    group: GroupColumn | None = None,
) -> Dataset:
    """The examples that `reference` names.

    A file that `spinecli.data.tables.read_table` reads, a directory (its train file), `builtin:tiny-topics`, or a hub
    data set `owner/name[:split]` (train by default).

    Args:
        labels: names to map labels by; None takes those that the data set has.
        group: where examples say whose they are; None leaves that out.

    Raises: DataError, MissingPathError, OfflineError, OptionError.
    """
    config = config or ExamplesConfig()
    table = _read_table(reference)
    columns = choose_columns(table, config, group)
    found = read_labels(table, columns.label, labels) if columns.label else None
    names = found.names if found else ()
    if columns.task == "classification" and len(names) < 2:
        raise DataError(
            f"{table.reference} has only the label {names[0]!r} in column {columns.label!r}; "
            "classification needs at least two, so name another column or file."
        )
    examples = tuple(
        _example(_Place(table, number), row, columns, found.indices[index] if found else None)
        for index, (number, row) in enumerate(table)
    )
    if config.limit is not None and config.limit < len(examples):
        # evenly spread, because files are often sorted by label
        examples = tuple(examples[step * len(examples) // config.limit] for step in range(config.limit))
    notes = (found.note,) if found and found.note else ()
    return Dataset(columns.task, examples, names, reference, notes)


def _read_table(reference: str) -> Table:
    if reference.startswith(BUILTIN):
        return builtin_table(reference)
    path = Path(reference).expanduser()
    if path.is_dir():
        return read_table(find_training(path))
    if path.exists():
        return read_table(path)
    if (hub := hub_name(reference)) is None:
        raise MissingPathError(
            f"{path} does not exist; name a file or directory of examples, {BUILTIN}tiny-topics, "
            "or a hub data set as owner/name."
        )
    return read_hub(hub[0], hub[1] or "train")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row stands, written out only in an error."""

    table: Table
    number: int

    def __str__(self) -> str:
        return self.table.place(self.number)


def _example(place: _Place, row: Row, columns: Columns, label: int | None) -> Example:
    group = _group(place, row, columns.group) if columns.group else None
    if columns.conversation:
        return _chat_example(place, row, columns, label, group)
    text = _text(place, row, columns.text)
    pair = answer = None
    if columns.answer is not None:
        answer = _text(place, row, columns.answer)
    if columns.pair is not None:
        optional = columns.answer is not None and row.get(columns.pair) in (None, "")
        pair = None if optional else _text(place, row, columns.pair)
    if columns.task == "classification":
        # many tokenizers make a trailing space a token, and a causal model's class is read off the last token
        text, pair = text.strip(), pair.strip() if pair else None
    return Example(text, pair, label, answer, group)


def _chat_example(place: _Place, row: Row, columns: Columns, label: int | None, group: str | None) -> Example:
    """The last answer of a conversation is learned; what comes behind it is not read."""
    turns = read_conversation(row.get(columns.text), str(place), columns.text)
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers or answers[-1] == 0 or not turns[answers[-1]].content.strip():
        raise DataError(
            f"{place} has a conversation without an answer of the assistant to learn in column {columns.text!r}; "
            "remove the row."
        )
    before = turns[: answers[-1]]
    for turn in turns:
        _refuse_surrogates(place, columns.text, turn.content)
    return Example(before[-1].content, None, label, turns[answers[-1]].content, group, before)


def _text(place: _Place, row: Row, column: str) -> str:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place} has an empty text in column {column!r}; fill it in or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"{place} has {value!r:.40} in column {column!r}, which is not text; fix the row.")
    _refuse_surrogates(place, column, value)
    return value


def _refuse_surrogates(place: _Place, column: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} has half a surrogate pair in column {column!r}, which is not a character; fix the row."
        ) from error


def _group(place: _Place, row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise DataError(f"{place} has no group in column {column!r}; fill it in or remove the row.")
