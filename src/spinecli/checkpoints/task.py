"""What a checkpoint answers, read from the architecture that its config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spinecli.checkpoints.family import Family, Task
from spinecli.errors import UnsupportedFamilyError


def task_of(file: Path, family: Family, raw_config: dict[str, Any]) -> Task:
    """The task of the checkpoint whose configuration lies in `file`.

    A causal checkpoint is a language model unless it names the classifier; an encoder that names nothing is bare.

    Raises: UnsupportedFamilyError for another head of an encoder, and for variants that spine cannot run.
    """
    for key, value in family.required.items():
        if raw_config.get(key) not in (None, value):
            raise UnsupportedFamilyError(
                f"{file} has {key} {raw_config[key]!r}; spine opens {family.model_type} with {value!r} only."
            )
    named = raw_config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture == family.classification_architecture:
        return Task.classification
    if family.kind == "causal":
        return Task.causal_lm
    known = {family.architecture: Task.masked_lm, family.bare_architecture: Task.encoding, None: Task.encoding}
    if architecture not in known:
        wanted = ", ".join((str(family.bare_architecture), family.architecture, family.classification_architecture))
        raise UnsupportedFamilyError(f"{file} names the architecture {architecture!r}; spine opens {wanted}.")
    return known[architecture]
