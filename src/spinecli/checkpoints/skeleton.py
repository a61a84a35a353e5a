"""A transformers model without weights: every parameter on the meta device, every computed buffer real.

Families that transformers does not know: known to its Auto classes here, and to a stranger's through the checkpoint.

A checkpoint of such a family carries its modelling file and names its classes under `auto_map`. spine itself never runs
that copy: it uses the module that is installed with it.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from spinecli.checkpoints.family import Family, Task, families


def register_shipped_modules() -> None:
    """Let transformers open the shipped families in this process; calling it again changes nothing."""
    for family in families().values():
        if family.modelling_file is None:
            continue
        module = import_module(f"spinecli.checkpoints.{family.modelling_file.removesuffix('.py')}")
        names = {auto: name.rpartition(".")[2] for auto, name in auto_map(family).items()}
        config = getattr(module, names.pop("AutoConfig"))
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, name in names.items():
            getattr(transformers, auto).register(config, getattr(module, name), exist_ok=True)


def auto_map(family: Family) -> dict[str, str]:
    """config.json's `auto_map`: where a stranger's transformers finds the classes of a shipped family."""
    module = str(family.modelling_file).removesuffix(".py")
    config = str(family.bare_architecture).removesuffix("Model") + "Config"
    language_model = "AutoModelForCausalLM" if family.kind == "causal" else "AutoModelForMaskedLM"
    return {
        "AutoConfig": f"{module}.{config}",
        "AutoModel": f"{module}.{family.bare_architecture}",
        language_model: f"{module}.{family.architecture}",
        "AutoModelForSequenceClassification": f"{module}.{family.classification_architecture}",
    }


def modelling_source(config: dict[str, Any]) -> Path | None:
    """The modelling file that a checkpoint with this config.json needs beside it; None if transformers has it."""
    family = families().get(config.get("model_type", ""))
    return Path(__file__).with_name(family.modelling_file) if family and family.modelling_file else None


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
