"""A checkpoint as the classifier that is measured: its head from the checkpoint or an adapter, its padding settled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spinecli.artifacts.manifest import MANIFEST_NAME
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.finetuned import fine_tuned
from spinecli.checkpoints.skeleton import build_skeleton
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.errors import OptionError
from spinecli.federation.data.encoding import padding_id
from spinecli.lora.peft_adapter import adapter_tensors


def padded_classifier(checkpoint: Checkpoint) -> Checkpoint:
    """A classifier whose configuration names a padding token, so that rows of different lengths form batches.

    Raises: OptionError if it does not choose one of several labels; TokenizerError.
    """
    config = checkpoint.config
    # what transformers calls regression is a single output
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise OptionError(
            f"{checkpoint.path} does not choose one of several labels (num_labels {config.num_labels}, problem_type "
            f"{config.problem_type}), which is all that spine measures of classifiers; name another checkpoint."
        )
    padding = config.pad_token_id
    if padding is not None and padding >= 0:
        return checkpoint
    config = copy.deepcopy(config)
    config.pad_token_id = padding_id(tokenizer_of(checkpoint))
    return replace(checkpoint, config=config)


def adapted_classifier(checkpoint: Checkpoint, adapter: Path, reference: str) -> Checkpoint:
    """The checkpoint, called `reference` by the user, as a classifier with the head that an adapter brings.

    Where the checkpoint has no classifier of its own, or fed-launch wrote the adapter, the padding is the tokenizer's,
    as fed-launch trains; and then nothing says what the labels are called.

    Raises: OptionError if neither checkpoint nor adapter has the whole head; TokenizerError, DamagedArtifactError.
    """
    skeleton = build_skeleton(checkpoint.config, Task.classification)
    names = set(skeleton.state_dict())
    head = {name: value for name, value in adapter_tensors(adapter).items() if name in names}
    misfit = f"The adapter {adapter} does not fit {reference}"
    labels = _labels(skeleton, checkpoint, head)
    if labels is None:
        raise OptionError(f"{misfit}: neither of them has a classifier; name the checkpoint that it was trained on.")
    own = checkpoint.labels == labels and not (adapter / MANIFEST_NAME).is_file()
    settings: dict[str, Any] = {}
    if not own:
        unnamed = {str(index): f"LABEL_{index}" for index in range(labels)}
        settings = {
            "id2label": unnamed,
            "label2id": {name: int(index) for index, name in unnamed.items()},
            "num_labels": labels,
            "problem_type": None,
            "pad_token_id": padding_id(tokenizer_of(checkpoint)),
        }
    try:
        # the values serve counting only: PEFT puts the head into the loaded model
        return padded_classifier(fine_tuned(checkpoint, Task.classification, head, settings))
    except ValueError as error:
        raise OptionError(f"{misfit} ({error}); name the checkpoint that it was trained on.") from error


def label_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a classifier calls its labels, in the order of its outputs; LABEL_0 and so on where it does not say."""
    names: Mapping[int, str] = checkpoint.config.id2label
    return tuple(str(names.get(index, f"LABEL_{index}")) for index in range(checkpoint.labels or 0))


def _labels(skeleton: nn.Module, checkpoint: Checkpoint, head: Mapping[str, Tensor]) -> int | None:
    """How many labels the head of an adapter tells apart, or the checkpoint's own if the adapter brings none."""
    place = checkpoint.family.classification_head
    linears = [
        f"{place}.{name}.weight" if name else f"{place}.weight"
        for name, module in skeleton.get_submodule(place).named_modules()
        if isinstance(module, nn.Linear)
    ]
    return len(head[linears[-1]]) if linears[-1] in head else checkpoint.labels
