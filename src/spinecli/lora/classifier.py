"""A checkpoint as the classifier that an adapter makes of it: whose head, whose labels, whose padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spinecli.artifacts.manifest import MANIFEST_NAME
from spinecli.checkpoints.checkpoint import Checkpoint, fine_tuned
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.skeleton import build_skeleton
from spinecli.checkpoints.tokenizer import has_tokenizer, padding_id, tokenizer_of
from spinecli.errors import OptionError
from spinecli.lora.peft_adapter import classifying_head, labels_of


def adapted_classifier(checkpoint: Checkpoint, adapter: Path, reference: str) -> Checkpoint:
    """The checkpoint, called `reference` by the user, as a classifier with the head that an adapter brings.

    Where the checkpoint has no classifier with as many labels, or fed-launch wrote the adapter, nothing says what the
    labels are called, and the padding is the tokenizer's, as fed-launch trains; without a tokenizer it stays unnamed.

    Raises: OptionError if neither checkpoint nor adapter has the whole head; TokenizerError, DamagedArtifactError.
    """
    skeleton = build_skeleton(checkpoint.config, Task.classification)
    head = classifying_head(adapter, skeleton)
    misfit = f"The adapter {adapter} does not fit {reference}"
    labels = labels_of(checkpoint.family.classification_head, skeleton, head) or checkpoint.labels
    if labels is None:
        raise OptionError(f"{misfit}: neither of them has a classifier; name the checkpoint that it was trained on.")
    own = checkpoint.labels == labels and not (adapter / MANIFEST_NAME).is_file()
    try:
        return fine_tuned(checkpoint, Task.classification, head, {} if own else _unnamed(checkpoint, labels))
    except ValueError as error:
        raise OptionError(f"{misfit} ({error}); name the checkpoint that it was trained on.") from error


def _unnamed(checkpoint: Checkpoint, labels: int) -> dict[str, Any]:
    """The keys of config.json of a classifier whose labels have no names."""
    names = {str(index): f"LABEL_{index}" for index in range(labels)}
    settings: dict[str, Any] = {
        "id2label": names,
        "label2id": {name: int(index) for index, name in names.items()},
        "num_labels": labels,
        "problem_type": None,
    }
    if has_tokenizer(checkpoint.path):
        settings["pad_token_id"] = padding_id(tokenizer_of(checkpoint))
    return settings
