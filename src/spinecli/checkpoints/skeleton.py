"""A transformers model without weights: every parameter on the meta device, every computed buffer real."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` in evaluation mode, parameters on the meta device in float32.

    Buffers that the architecture computes (rotary frequencies) are real, so blocks can run as soon as their own
    parameters are assigned.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def stored_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the checkpoint must hold; tied copies are not stored."""
    tied = set(skeleton.all_tied_weights_keys)
    return {name: tuple(value.shape) for name, value in skeleton.state_dict().items() if name not in tied}
