"""PEFT adapters: checked on disk, then put on a model. Pickled ones are never opened."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from spinecli.errors import DamagedArtifactError, ForeignArtifactError, MissingPathError, OptionError, UnsafeFileError
from spinecli.lora.peft_format import PEFT_PREFIX

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def adapter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an adapter, from its header alone.

    Raises: MissingPathError, ForeignArtifactError, UnsafeFileError (pickled weights), DamagedArtifactError.
    """
    if not directory.is_dir():
        raise MissingPathError(f"{directory} is not a directory; name one that holds a PEFT adapter.")
    if not (directory / CONFIG_NAME).is_file():
        raise ForeignArtifactError(f"{directory} has no {CONFIG_NAME}; name a directory that holds a PEFT adapter.")
    weights = directory / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(path.name for path in directory.glob("adapter_model.*"))
        if pickles:
            raise UnsafeFileError(
                f"{directory} holds {pickles[0]} and no {WEIGHTS_NAME}; spine never unpickles, so save the adapter "
                "as safetensors first."
            )
        raise ForeignArtifactError(f"{directory} has no {WEIGHTS_NAME}; name a directory that holds a PEFT adapter.")
    try:
        with safe_open(weights, framework="pt") as handle:
            names = list(handle.keys())
            return {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise DamagedArtifactError(f"{weights} is truncated or not safetensors; fetch the adapter again.") from error


def classifies(directory: Path) -> bool:
    """Whether the adapter in `directory`, which `adapter_shapes` has checked, makes a classifier of its model.

    Raises: DamagedArtifactError.
    """
    file = directory / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"{file} is not readable JSON; fetch the adapter again.") from error
    if not isinstance(config, dict):
        raise DamagedArtifactError(f"{file} is no JSON object; fetch the adapter again.")
    return config.get("task_type") == "SEQ_CLS"


def adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of an adapter that `adapter_shapes` has checked, by its name in the model without PEFT's prefix."""
    with safe_open(directory / WEIGHTS_NAME, framework="pt") as handle:
        return {name.removeprefix(PEFT_PREFIX): handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def attach_adapter(model: PreTrainedModel, directory: Path, base: str) -> PeftModel:
    """The model, called `base` by the user, with the adapter on it, unmerged, in evaluation mode.

    Raises: OptionError if the adapter was made for another model, and everything `adapter_shapes` raises.
    """
    stored = adapter_shapes(directory)
    misfit = f"The adapter {directory} does not fit {base}"
    way_out = "name the checkpoint that it was trained on"
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if config.is_prompt_learning:
            raise OptionError(f"The adapter {directory} adds virtual tokens; spine measures adapters of weights only.")
        adapted = PeftModel.from_pretrained(
            model, str(directory), config=config, is_trainable=False, torch_device=str(model.device)
        )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise OptionError(f"{misfit} ({reason}); {way_out}.") from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name in sorted(wanted.keys() ^ stored.keys()):
        which = "has no place there" if name in stored else "is missing"
        raise OptionError(f"{misfit}: its tensor {name} {which}; {way_out}.")
    if not all(bool(torch.isfinite(value).all()) for value in wanted.values()):
        raise DamagedArtifactError(f"{directory} holds NaN or infinite values; train the adapter again.")
    return adapted.eval()
