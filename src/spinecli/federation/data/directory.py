"""A directory of splits: which file is for training and which for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spinecli.data.tables import KINDS, SUFFIXES
from spinecli.errors import DataError

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
            raise DataError(f"{directory} has {listed}, of which one can be meant; name the file itself.")
        if found:
            return found[0]
    return None
