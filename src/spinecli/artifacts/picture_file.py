"""A picture as a file that a user names. Drawing needs matplotlib, which is optional."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spinecli.artifacts.manifest import MANIFEST_NAME
from spinecli.errors import (
    MissingPackageError,
    MissingPathError,
    OptionError,
    OutputExistsError,
    OutputNotWritableError,
)

SUFFIXES = (".png", ".svg", ".pdf")


def require_matplotlib() -> None:
    """Raise MissingPackageError where no picture can be drawn."""
    if find_spec("matplotlib") is None:
        raise MissingPackageError("--plot needs matplotlib; install it with pip install 'spinecli[plots]'.")


def check_picture(path: Path, artifact: Path, *, overwrite: bool = False) -> None:
    """Refuse a place for a picture before anything is drawn.

    Args:
        artifact: the directory that is drawn. A new file in it, or in any other that has a manifest, would make it
            differ from what a spine command wrote.

    Raises: MissingPackageError, OptionError, MissingPathError, OutputExistsError, OutputNotWritableError.
    """
    require_matplotlib()
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory; name a file for --plot, such as {path / 'cut.png'}.")
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot writes {', '.join(SUFFIXES)} files, not {path.name}; change its ending.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise MissingPathError(f"{path.parent} does not exist; create it or choose another place for --plot.")
    taken = [place for place in (folder, *folder.parents) if (place / MANIFEST_NAME).is_file()]
    if taken or folder.is_relative_to(artifact.resolve()):
        place = taken[-1] if taken else artifact
        raise OutputExistsError(f"{path} lies inside {place}, which holds what spine wrote; choose another place.")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; add --overwrite to replace it or name another file for --plot.")
    if not os.access(folder, os.W_OK):
        raise OutputNotWritableError(f"{folder} cannot be written to; fix its permissions or name another file.")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, whole or not at all; the same figure gives the same bytes."""
    part = path.with_name(f".{path.name}.part{path.suffix}")
    # what matplotlib would note: its version in a PNG, the time in the others
    unnoted = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}[path.suffix.lower()]
    try:
        figure.savefig(part, dpi=144, metadata={unnoted: None})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
