"""Outputs without a `spine.json` that appear whole or not at all: one file, or a directory of known files.

What is being written lies beside its final place as `.NAME.spine-part`. A failed run removes it; what a killed one
leaves is replaced by the next run.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from spinecli.artifacts.directory import sync
from spinecli.checkpoints.writer import is_companion
from spinecli.errors import (
    MissingPathError,
    NoSpaceError,
    OutputExistsError,
    OutputNotWritableError,
    UnfinishedRunError,
)

_CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "modeling_*.py",
)


def check_file_output(out: Path, overwrite: bool, checkpoint: Path) -> None:
    """Refuse a file's path that is taken, has no parent, or lies in the checkpoint, before any work is done.

    Raises: MissingPathError, OutputNotWritableError, OutputExistsError.
    """
    _check_place(out, checkpoint)
    if out.is_dir():
        raise OutputExistsError(f"{out} is a directory; name a file, such as {out / 'model.gguf'}.")
    if out.exists() and not overwrite:
        raise _taken(out)


def check_directory_output(out: Path, overwrite: bool, checkpoint: Path) -> None:
    """The same for a directory, which must hold nothing but a checkpoint's files to be replaced."""
    _check_place(out, checkpoint)
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputExistsError(f"{out} is a file; choose another --out.")
    foreign = sorted(path.name for path in out.iterdir() if not _belongs_to_checkpoint(path, out))
    if foreign:
        raise OutputExistsError(f"{out} holds {foreign[0]}, which no export writes; choose another --out.")
    if any(out.iterdir()) and not overwrite:
        raise _taken(out)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `out` if the context ends well.

    Raises: UnfinishedRunError if another process is writing it, NoSpaceError.
    """
    place = out.resolve()
    part = _part_of(place)
    with part.open("ab") as handle, _locked(handle.fileno(), out), _space_reported(place):
        try:
            yield part
            os.fsync(handle.fileno())
            part.replace(place)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    sync(place.parent)


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """The same with a directory to write into."""
    place = out.resolve()
    part, previous = _part_of(place), place.parent / f".{place.name}.spine-previous"
    if previous.exists() and not place.exists():
        previous.rename(place)
    part.mkdir(exist_ok=True)
    handle = os.open(part, os.O_RDONLY)
    try:
        with _locked(handle, out), _space_reported(place):
            try:
                _empty(part)
                yield part
                for path in sorted(part.iterdir()):
                    sync(path)
                os.fsync(handle)
                shutil.rmtree(previous, ignore_errors=True)
                if place.exists():
                    place.rename(previous)
                part.rename(place)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        sync(place.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        os.close(handle)


def _check_place(out: Path, checkpoint: Path) -> None:
    place, source = out.resolve(), checkpoint.resolve()
    if not place.parent.is_dir():
        raise MissingPathError(f"{out.parent} does not exist; create it or choose another --out.")
    if place == source or source in place.parents or place in source.parents:
        raise OutputExistsError(f"{out} and the checkpoint {checkpoint} are inside each other; choose another --out.")
    if not os.access(place.parent, os.W_OK):
        raise OutputNotWritableError(
            f"{place.parent} cannot be written to; fix its permissions or choose another --out."
        )


def _belongs_to_checkpoint(path: Path, out: Path) -> bool:
    weights = path.is_file() and any(fnmatch(path.name, pattern) for pattern in _CHECKPOINT_FILES)
    return weights or is_companion(out, path)


def _taken(out: Path) -> OutputExistsError:
    return OutputExistsError(f"{out} exists; add --overwrite to replace it or choose another --out.")


def _part_of(place: Path) -> Path:
    return place.parent / f".{place.name}.spine-part"


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _locked(handle: int, out: Path) -> Iterator[None]:
    """Hold what is being written against a second process; the system drops the lock when its holder dies."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system; the rename still keeps outputs whole
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UnfinishedRunError(f"Another process is writing {out}; wait for it to end.") from error
    yield


@contextmanager
def _space_reported(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise NoSpaceError(f"The disk of {place.parent} is full; free some space or choose another --out.") from error
