"""The model that transformers itself loads from a checkpoint's directory; of a large one the blocks stay on disk."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.skeleton import auto_class
from spinecli.checkpoints.stream.block_stream import ComputeOptions

# Up to this size a whole model is kept in memory.
WHOLE_MODEL_BYTES = 1 << 30


def stays_on_disk(checkpoint: Checkpoint) -> bool:
    """Whether the blocks are read anew each time that they run."""
    return checkpoint.bytes > WHOLE_MODEL_BYTES


def whole_model(
    checkpoint: Checkpoint, compute: ComputeOptions, *, in_memory: bool = False
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """The model in evaluation mode, and what transformers reports of loading.

    It is on the device of `compute`, or on the CPU if its blocks stay on disk.

    Args:
        in_memory: load all of it, however large it is.
    """
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    config.return_dict, config.torchscript = True, False
    if "quantization_config" not in checkpoint.raw_config and hasattr(config, "quantization_config"):
        del config.quantization_config  # it is not true, see `Checkpoint.open`
    places = _places(checkpoint) if stays_on_disk(checkpoint) and not in_memory else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: tuple[Any, dict[str, set[str]]] = auto_class(checkpoint.task).from_pretrained(
            checkpoint.path,
            config=config,
            dtype=compute.dtype,
            device_map=places,
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    model, info = loaded
    return (model if places else model.to(compute.device)).eval(), info


def _places(checkpoint: Checkpoint) -> dict[str, str]:
    """Where accelerate is to keep the model's parts: the blocks on disk, all else in memory."""
    places: dict[str, str] = {checkpoint.blocks_path: "disk"}
    module: nn.Module = checkpoint.skeleton()
    prefix = ""
    for step in checkpoint.blocks_path.split("."):
        places |= {prefix + name: "cpu" for name, _ in module.named_children() if name != step}
        module, prefix = module.get_submodule(step), f"{prefix}{step}."
    return places
