"""The labelled examples of an evaluation, in the tokens and the outputs of each model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spinecli.data.config import ExamplesConfig
from spinecli.data.encoding import Encoded, encode
from spinecli.data.examples import BUILTIN, Dataset, load_dataset
from spinecli.data.hub import hub_name
from spinecli.data.splits import evaluation_beside
from spinecli.errors import DataError, OptionError
from spinecli.evaluation.config import DEFAULT_MAX_LENGTH, LabelledConfig
from spinecli.evaluation.lengths import fit_row_length
from spinecli.evaluation.models import Subject, label_names
from spinecli.evaluation.results import Matching

_UNNAMED = re.compile(r"LABEL_\d+")
_NUMBER = re.compile(r"-?\d+")
_LISTED = 10


@dataclass(frozen=True)
class LabelMatch:
    """A classifier's outputs by a data set's labels."""

    outputs: tuple[int, ...]
    """One a label of the data, in the data's order; no two are equal."""
    by: Matching


def match_labels(labels: Sequence[str], data: str, names: Sequence[str], model: str) -> LabelMatch:
    """Find every label of the data called `data` among the names of the outputs of `model`.

    By name, upper and lower case alike if nothing else tells labels apart; the data need not have every label. Where
    one side has no names, by position: labels that are numbers from 0 on are the numbers of outputs, and as many labels
    as outputs that are called LABEL_0 and so on follow their order.

    Raises: DataError, naming the labels of both sides.
    """
    for found in (_by_name(labels, names), _by_name(_folded(labels), _folded(names))):
        if found is not None:
            return LabelMatch(found, "name")
    numbered = {str(index): index for index in range(len(names))}
    if not any(map(_NUMBER.fullmatch, names)) and all(label in numbered for label in labels):
        return LabelMatch(tuple(numbered[label] for label in labels), "position")
    if len(labels) == len(names) and all(map(_UNNAMED.fullmatch, names)):
        return LabelMatch(tuple(range(len(names))), "position")
    raise DataError(
        f"{data} has {len(labels)} labels ({listed(labels)}) and {model} answers with {len(names)} ({listed(names)}), "
        "which do not match; name the data or the column that the model was trained for."
    )


def listed(names: Sequence[str]) -> str:
    """The first few names, separated by commas."""
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _by_name(labels: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    places = {name: index for index, name in enumerate(names)}
    unambiguous = len(places) == len(names) and len(set(labels)) == len(labels)
    if not unambiguous or not places.keys() >= set(labels):
        return None
    return tuple(places[label] for label in labels)


def _folded(names: Sequence[str]) -> list[str]:
    return [name.casefold().strip() for name in names]


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Labelled examples that all models answer."""

    config: LabelledConfig
    """With `max_length` filled in."""
    max_length: int
    """Longest row in tokens."""
    dataset: Dataset
    encoded: tuple[Encoded, ...]
    """One a model."""
    matches: tuple[LabelMatch, ...]
    """One a model."""

    @property
    def description(self) -> str:
        """A short name of what is measured on."""
        return _described(self.config.data, self.dataset.reference)

    def targets(self, index: int) -> Tensor:
        """The output of model `index` that is right, of every example: (examples,) int64."""
        return torch.tensor(self.matches[index].outputs)[self.encoded[index].labels]


def read_labelled(config: LabelledConfig, subjects: Sequence[Subject], note: Callable[[str], None]) -> LabelledSet:
    """Read the examples and put them into the tokens of every model; `note` hears what is not as one would expect.

    Raises: DataError, MissingPathError, OfflineError, OptionError, TokenizerError.
    """
    positions = {subject.label: subject.positions for subject in subjects}
    length = fit_row_length(config.max_length, DEFAULT_MAX_LENGTH, positions, "--max-length", note)
    config = config.model_copy(update={"max_length": length})
    options = ExamplesConfig(
        text_column=config.text_column,
        pair_column=config.pair_column,
        label_column=config.label_column,
        task="classification",
        limit=config.examples,
    )
    dataset = load_dataset(_held_out(config.data), options)
    for sentence in dataset.notes:
        note(sentence)
    description = _described(config.data, dataset.reference)
    if dataset.reference != config.data:
        note(f"{config.data} is measured on its part {description}.")
    matches = tuple(_matched(dataset, description, subject, note) for subject in subjects)
    encoded = tuple(_encoded(dataset, subject, length) for subject in subjects)
    for rows, subject in zip(encoded, subjects, strict=True):
        if rows.shortened:
            note(f"{rows.shortened} of {len(rows)} examples were shortened to {length} tokens for {subject.label}.")
    return LabelledSet(config, length, dataset, encoded, matches)


def _held_out(reference: str) -> str:
    """What to measure on: the file that is named, or the validation or test part of anything that has parts."""
    found = evaluation_beside(reference)
    if found is not None:
        return found
    path = Path(reference).expanduser()
    hub = None if reference.startswith(BUILTIN) or path.exists() else hub_name(reference)
    if path.is_dir():
        raise DataError(f"{reference} has no validation, dev or test file; name the file to measure on.")
    if hub is not None and hub[1] is None:
        raise DataError(f"{reference} has no validation or test split; name a split as {reference}:SPLIT.")
    return reference


def _described(named: str, measured: str) -> str:
    """The file's name, with the directory's before it if that is what was named; other data as it is called."""
    path = Path(measured).expanduser()
    if not path.is_file():
        return measured
    return path.name if measured == named else f"{path.parent.resolve().name}/{path.name}"


def _matched(dataset: Dataset, description: str, subject: Subject, note: Callable[[str], None]) -> LabelMatch:
    names = label_names(subject.checkpoint)
    match = match_labels(dataset.labels, description, names, subject.label)
    if match.by == "position":
        pairs = [f"{label} = {names[output]}" for label, output in zip(dataset.labels, match.outputs, strict=True)]
        note(f"Labels of {description} and {subject.label} are matched by position: {listed(pairs)}.")
    return match


def _encoded(dataset: Dataset, subject: Subject, length: int) -> Encoded:
    tokenizer = subject.tokenizer
    try:
        rows = encode(dataset, tokenizer, length, vocabulary=subject.vocabulary)
    except OptionError as error:
        raise OptionError(f"{subject.label}: {error}") from error
    # the model's own: causal classifiers look for it, and RoBERTa counts positions from behind it
    return replace(rows, pad_id=int(subject.checkpoint.config.pad_token_id))
