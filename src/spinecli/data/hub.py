"""Data sets on the Hugging Face hub, named `owner/name` or `owner/name:split`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from spinecli.data.tables import SUFFIXES, Numbered, Table
from spinecli.errors import DataError, OfflineError, reason_of

_REFERENCE = re.compile(r"^([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?$")


def hub_name(reference: str) -> tuple[str, str | None] | None:
    """The data set and split that a reference names; None if it has the form of a path."""
    match = _REFERENCE.match(reference)
    return None if match is None or match[1].lower().endswith(SUFFIXES) else (match[1], match[2])


def read_hub(name: str, split: str, *, streaming: bool = False) -> Table:
    """The rows of one split.

    Args:
        streaming: fetch rows as they are read; else the data set is downloaded into the hub's own cache.

    Raises: OfflineError if it cannot be fetched, DataError if it cannot be used as it is.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, split=split, **({"streaming": True} if streaming else {}))
    except ValueError as error:
        raise _unusable(name, error) from error
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise _unreachable(name) from error

    def rows() -> Iterator[Numbered]:
        try:
            yield from enumerate(found, start=1)
        except ValueError as error:
            raise _unusable(name, error) from error
        except OSError as error:
            raise _unreachable(name) from error

    return Table(f"{name}:{split}", _columns(name, split, found, rows), rows, unit="row")


def _columns(name: str, split: str, found: Any, rows: Any) -> tuple[str, ...]:
    first = next(rows(), None)
    if first is None:
        raise DataError(f"The hub data set {name} has no examples in its split {split}; name another split.")
    # a stream may know its columns only by its rows
    return tuple(getattr(found, "column_names", None) or first[1])


def hub_splits(name: str) -> tuple[str, ...]:
    """The splits that a data set has.

    Raises: OfflineError if it cannot be fetched, DataError if it cannot be used as it is.
    """
    import datasets

    try:
        return tuple(str(split) for split in datasets.get_dataset_split_names(name))
    except ValueError as error:
        raise _unusable(name, error) from error
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise _unreachable(name) from error


def _unreachable(name: str) -> OfflineError:
    return OfflineError(
        f"{name} is no file here, and no data set of that name could be fetched from the hub; name a local file."
    )


def _unusable(name: str, error: ValueError) -> DataError:
    reason = reason_of(error)
    return DataError(
        f"The hub data set {name} cannot be used as it is ({reason}); save it as .jsonl and name the file."
    )
