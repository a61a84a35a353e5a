"""Which column of a table is the text, its pair, the label, the answer, the group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spinecli.errors import DataError, OptionError
from spinecli.federation.data.tables import Table

Task = Literal["classification", "language"]

# In order of preference: a pair of texts before a text that stands alone.
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
_TEXTS = ("text", "sentence", "sentence1", "question", "content")
_LABELS = ("label", "labels", "category", "class")
_PROMPTS = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"))
_INPUTS = ("input", "context")
_GROUPS = ("client", "speaker", "user", "device")


@dataclass(frozen=True)
class DataOptions:
    """What a user says about a data set; None leaves it to be recognised."""

    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    grouped: bool = False
    """Examples carry a group even if `group_column` is None; its column is then recognised by name."""
    task: Task | None = None
    limit: int | None = None
    """At most so many examples of each file, spread evenly over it."""


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


def choose_columns(table: Table, options: DataOptions) -> Columns:
    """The columns that `options` names, and by their usual names those it leaves open.

    The task, if not given: instructions with answers are language modelling, anything else with a label column is
    classification, and text alone is language modelling. Language modelling reads labels only from a column that
    `options` names, because it needs none to train.

    Raises: DataError if a column is absent, OptionError if two options contradict each other.
    """
    label = _named(table, options.label_column)
    group = _group(table, options)
    prompt = None if options.text_column else _first_present(table, _PROMPTS)
    task = options.task or _task(table, label is not None, prompt is not None)
    if task == "language":
        if options.pair_column:
            raise OptionError("--pair-column is for classification of text pairs; leave it out for language modelling.")
        if prompt is not None:
            return Columns(task, prompt[0], _recognised(table, _INPUTS), label=label, answer=prompt[1], group=group)
        return Columns(task, _text(table, options)[0], label=label, group=group)
    label = label or _recognised(table, _LABELS)
    if label is None:
        raise DataError(
            f"{table.reference} has none of the label columns {', '.join(_LABELS)}; "
            f"name one of its columns with --label-column: {_listed(table)}."
        )
    text, pair = _text(table, options)
    return Columns(task, text, pair, label=label, group=group)


def _task(table: Table, label_named: bool, prompted: bool) -> Task:
    if prompted:
        return "language"
    return "classification" if label_named or _recognised(table, _LABELS) else "language"


def _text(table: Table, options: DataOptions) -> tuple[str, str | None]:
    text, pair = _named(table, options.text_column), _named(table, options.pair_column)
    if text is None and pair is None and options.task != "language" and (found := _first_present(table, _PAIRS)):
        return found
    if text is None:
        text = _recognised(table, tuple(name for name in _TEXTS if name != (pair or "").lower()))
    if text is None:
        raise DataError(
            f"{table.reference} has none of the text columns {', '.join(_TEXTS)}; "
            f"name one of its columns with --text-column: {_listed(table)}."
        )
    return text, pair


def _group(table: Table, options: DataOptions) -> str | None:
    if options.group_column or not options.grouped:
        return _named(table, options.group_column)
    group = _recognised(table, _GROUPS)
    if group is None:
        raise DataError(
            f"{table.reference} has none of the columns {', '.join(_GROUPS)} to group by; "
            f"name one of its columns as column:NAME: {_listed(table)}."
        )
    return group


def _named(table: Table, column: str | None) -> str | None:
    if column is not None and column not in table.columns:
        raise DataError(f"{table.reference} has no column {column!r}; its columns are {_listed(table)}.")
    return column


def _recognised(table: Table, names: tuple[str, ...]) -> str | None:
    present = {column.lower(): column for column in reversed(table.columns)}
    return next((present[name] for name in names if name in present), None)


def _first_present(table: Table, couples: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    for first, second in couples:
        found = _recognised(table, (first,)), _recognised(table, (second,))
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def _listed(table: Table) -> str:
    return ", ".join(table.columns)
