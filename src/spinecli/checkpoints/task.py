"""What a checkpoint answers, read from the architecture that its config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from spinecli.checkpoints.family import Family, Task
from spinecli.errors import UnsupportedFamilyError

# How transformers' classes of language models end.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


def task_of(file: Path, family: Family, raw_config: dict[str, Any]) -> Task:
    """The task of the checkpoint whose configuration lies in `file`.

    A causal checkpoint is a language model if it names nothing, or the model without its head, which may be tied; an
    encoder that names nothing is bare.

    Raises: UnsupportedFamilyError for another head, and for variants that spine cannot run.
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
    headless = family.bare_architecture or MODEL_MAPPING_NAMES.get(family.model_type)
    if family.kind == "causal" and (architecture in (None, headless) or str(architecture).endswith(_LANGUAGE_MODELS)):
        return Task.causal_lm
    known = {family.architecture: Task.masked_lm, family.bare_architecture: Task.encoding, None: Task.encoding}
    if family.kind == "causal" or architecture not in known:
        raise UnsupportedFamilyError(
            f"{file} names the architecture {architecture!r}, whose head spine does not know; it opens {headless}, "
            f"{family.architecture}, {family.classification_architecture}."
        )
    return known[architecture]
