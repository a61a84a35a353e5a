"""A training set and what it is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spinecli.data.config import ExamplesConfig
from spinecli.data.example_columns import GroupColumn
from spinecli.data.examples import TOPICS, TOPICS_VALIDATION, Dataset, evaluation_split, find_evaluation, load_dataset
from spinecli.data.hub import hub_name, hub_splits
from spinecli.errors import DataError, OptionError

# keeps this draw apart from others of the same seed
_STREAM = 1


@dataclass(frozen=True)
class Splits:
    """Two sets of examples with the same task and label names."""

    train: Dataset
    evaluation: Dataset

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should hear of these data."""
        return tuple(dict.fromkeys((*self.train.notes, *self.evaluation.notes)))


def load_splits(
    reference: str,
    evaluation: str | None = None,
    evaluation_share: float = 0.1,
    seed: int = 0,
    config: ExamplesConfig | None = None,
    group: GroupColumn | None = None,
) -> Splits:
    """The training set that `reference` names, and a set to evaluate on.

    The latter is, in this order: `evaluation` if named; the validation, dev or test split beside the training set in a
    directory or on the hub; a share of the training set, drawn by `seed` and then not trained on.

    Args:
        evaluation_share: share of each label (of all examples where there are no labels) to hold out if there is no
            evaluation set, above 0 and below 1.
        group: where the examples to train on say whose they are.

    Raises: DataError, MissingPathError, OfflineError, OptionError.
    """
    config = config or ExamplesConfig()
    train = load_dataset(reference, config, group=group)
    evaluation = evaluation or evaluation_beside(reference)
    if evaluation is None:
        return hold_out(train, evaluation_share, seed)
    classified = train.task == "classification"
    # the labels of a language task, and groups, serve to deal examples out to devices: an evaluation set needs neither
    label_column = config.label_column if classified else None
    own = config.model_copy(update={"task": train.task, "label_column": label_column})
    return Splits(train, load_dataset(evaluation, own, train.labels if classified else None))


def hold_out(dataset: Dataset, share: float, seed: int) -> Splits:
    """The data set without a share of each label, and that share; both keep their order.

    Every label with two examples or more is on both sides.

    Raises: OptionError if the share is out of range, DataError if there are too few examples.
    """
    if not 0 < share < 1:
        raise OptionError(f"--evaluation-share must lie above 0 and below 1, not {share}.")
    generator = np.random.default_rng((seed, _STREAM))
    pools: dict[int | None, list[int]] = {}
    for index, example in enumerate(dataset.examples):
        pools.setdefault(example.label, []).append(index)
    held: set[int] = set()
    for label in sorted(pools, key=lambda label: -1 if label is None else label):
        pool = pools[label]
        count = min(max(round(share * len(pool)), 1), len(pool) - 1)
        held.update(int(index) for index in generator.permutation(pool)[:count])
    if not held:
        raise DataError(
            f"{dataset.reference} has too few examples to hold some out for evaluation; name an evaluation set."
        )
    kept = [index for index in range(len(dataset)) if index not in held]
    return Splits(dataset.subset(kept), dataset.subset(sorted(held)))


def evaluation_beside(reference: str) -> str | None:
    """The validation, dev or test part of what `reference` names; None for a single file, and where there is none.

    Raises: DataError, OfflineError.
    """
    if reference == TOPICS:
        return TOPICS_VALIDATION
    path = Path(reference).expanduser()
    if path.is_dir():
        found = find_evaluation(path)
        return None if found is None else str(found)
    hub = None if path.exists() else hub_name(reference)
    if hub is None or hub[1] is not None:
        return None
    split = evaluation_split(hub_splits(hub[0]))
    return None if split is None else f"{hub[0]}:{split}"
