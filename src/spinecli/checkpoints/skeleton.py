"""A transformers model without weights: every parameter on the meta device, every computed buffer real."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from spinecli.checkpoints.family import Task
from spinecli.checkpoints.shipped_modules import register_shipped_modules

register_shipped_modules()

_AUTO_CLASSES = {
    Task.causal_lm: AutoModelForCausalLM,
    Task.masked_lm: AutoModelForMaskedLM,
    Task.classification: AutoModelForSequenceClassification,
    Task.encoding: AutoModel,
}


def auto_class(task: Task) -> Any:
    """The Auto class of transformers that opens a checkpoint made for `task`."""
    return _AUTO_CLASSES[task]


def build_skeleton(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """The model of `config` for `task` in evaluation mode, parameters on the meta device in float32.

    Buffers that the architecture computes (rotary frequencies) are real, so blocks can run as soon as their own
    parameters are assigned.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(task).from_config(
            deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
    return model.eval().requires_grad_(False)


def stored_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the checkpoint must hold; tied copies are not stored."""
    tied = set(skeleton.all_tied_weights_keys)
    return {name: tuple(value.shape) for name, value in skeleton.state_dict().items() if name not in tied}
