"""Sums to compare by: of an artifact's files, of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

FACTS = "spine.json"
PICTURE = "history.png"


def contents(directory: Path) -> dict[str, str]:
    """The sum of every file of an artifact; of spine.json its digest, which covers all but the measured part."""
    facts: str = json.loads((directory / FACTS).read_text())["digest"]
    return {**_files(directory), FACTS: facts}


def learned(directory: Path) -> dict[str, str]:
    """The sums of everything that a federated run has written, but its page of facts, which names the engine."""
    return {name: found for name, found in _files(directory).items() if name not in (FACTS, PICTURE)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A sum over names, dtypes, shapes and bytes, whatever the order."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().view(-1).float().numpy().tobytes())
    return found.hexdigest()


def _files(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
