"""Which output of a classifier stands for which label of a data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spinecli.errors import DataError
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
