"""Which column of a table is the text, its pair, the label, the answer, the group."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.data.columns import (
    CONVERSATIONS,
    GROUPS,
    INPUTS,
    LABELS,
    PAIRS,
    PROMPTS,
    TEXTS,
    first_couple,
    recognised,
    text_columns,
)
from spinecli.data.config import ExamplesConfig, Task
from spinecli.data.tables import Table
from spinecli.errors import DataError, OptionError


@dataclass(frozen=True)
class GroupColumn:
    """Examples carry whose they are."""

    name: str | None = None
    """Of the column; None: it is recognised by its name."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table by what they are for."""

    task: Task
    text: str
    pair: str | None = None
    label: str | None = None
    answer: str | None = None
    """Not None for instructions, whose `pair` is the input that may be left empty."""
    group: str | None = None
    conversation: bool = False
    """`text` is a list of messages, of which the last answer is learned."""


def choose_columns(table: Table, config: ExamplesConfig, group: GroupColumn | None = None) -> Columns:
    """The columns that `config` and `group` name, and by their usual names those they leave open.

    The task, if not given: instructions with answers and conversations are language modelling, anything else with a
    label column is classification, and text alone is language modelling. Language modelling reads labels only from a
    column that `config` names, because it needs none to train.

    Raises: DataError if a column is absent, OptionError if two options contradict each other.
    """
    label = _named(table, config.label_column)
    grouped = None if group is None else _group(table, group)
    prompt = None if config.text_column else first_couple(table.columns, PROMPTS)
    chat = _chat(table, config)
    task = config.task or _task(table, label is not None, prompt is not None or chat is not None)
    if task == "language":
        if config.pair_column:
            raise OptionError("--pair-column is for classification of text pairs; drop it for language modelling.")
        if prompt is not None:
            given = recognised(table.columns, INPUTS)
            return Columns(task, prompt[0], given, label=label, answer=prompt[1], group=grouped)
        if chat is not None:
            return Columns(task, chat, label=label, group=grouped, conversation=True)
        return Columns(task, _text(table, config)[0], label=label, group=grouped)
    label = label or recognised(table.columns, LABELS)
    if label is None:
        raise DataError(
            table.wrong_separator
            or f"{table.reference} has none of the label columns {', '.join(LABELS)}; "
            f"name one of its columns with --label-column: {_listed(table)}."
        )
    text, pair = _text(table, config)
    return Columns(task, text, pair, label=label, group=grouped)


def _task(table: Table, label_named: bool, prompted: bool) -> Task:
    if prompted:
        return "language"
    return "classification" if label_named or recognised(table.columns, LABELS) else "language"


def _chat(table: Table, config: ExamplesConfig) -> str | None:
    """The column of conversations: the one that is named, or where nothing else is a text."""
    named = _named(table, config.text_column)
    if named is not None:
        return recognised((named,), CONVERSATIONS)
    return None if text_columns(table.columns) else recognised(table.columns, CONVERSATIONS)


def _text(table: Table, config: ExamplesConfig) -> tuple[str, str | None]:
    text, pair = _named(table, config.text_column), _named(table, config.pair_column)
    if text is None and pair is None and config.task != "language" and (found := first_couple(table.columns, PAIRS)):
        return found
    if text is None:
        text = recognised(table.columns, (name for name in TEXTS if name != (pair or "").lower()))
    if text is None:
        raise DataError(
            table.wrong_separator
            or f"{table.reference} has none of the text columns {', '.join(TEXTS)}; "
            f"name one of its columns with --text-column: {_listed(table)}."
        )
    return text, pair


def _group(table: Table, wanted: GroupColumn) -> str:
    group = _named(table, wanted.name) or recognised(table.columns, GROUPS)
    if group is None:
        raise DataError(
            f"{table.reference} has none of the columns {', '.join(GROUPS)} to group by; "
            f"name one of its columns as column:NAME: {_listed(table)}."
        )
    return group


def _named(table: Table, column: str | None) -> str | None:
    if column is not None and column not in table.columns:
        raise DataError(f"{table.reference} has no column {column!r}; its columns are {_listed(table)}.")
    return column


def _listed(table: Table) -> str:
    return ", ".join(table.columns)
