"""A checkpoint with what fine-tuning changed: the same blocks, other values, perhaps another head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint, config_from
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.skeleton import build_skeleton, stored_shapes
from spinecli.checkpoints.tensors import TensorSource, held
from spinecli.checkpoints.validation import aliases


def fine_tuned(
    checkpoint: Checkpoint, task: Task, values: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> Checkpoint:
    """`checkpoint` as fine-tuning for `task` leaves it; it can be streamed, cut and written like any other.

    Args:
        values: tensors that differ from the checkpoint's, by their names in the model of `task`, uncut: projections
            with an adapter merged, the classifier. They are kept in memory, in the dtype of the checkpoint's blocks.
        settings: keys of config.json that differ, such as `id2label`.

    Raises: ValueError if a tensor of the model is neither in `values` nor in the checkpoint, or has another shape.
    """
    family = checkpoint.family
    raw_config = {**checkpoint.raw_config, **(settings or {}), "architectures": [family.architecture_of(task)]}
    config = config_from(raw_config)
    skeleton = build_skeleton(config, task)
    expected = stored_shapes(skeleton)
    if strangers := values.keys() - expected.keys():
        raise ValueError(f"{sorted(strangers)[0]} is no tensor of a {family.architecture_of(task)}")
    tensors: dict[str, TensorSource] = {}
    for name, shape in expected.items():
        known = [alias for alias in aliases(name, skeleton.base_model_prefix + ".") if alias in checkpoint.tensors]
        if name in values:
            tensors[name] = held(values[name].detach().to("cpu", checkpoint.storage_dtype))
        elif known:
            tensors[name] = checkpoint.tensors[known[0]]
        else:
            raise ValueError(f"neither the checkpoint nor fine-tuning has {name}")
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tensors[name].shape}, not {shape}")
    return replace(checkpoint, raw_config=raw_config, config=config, task=task, tensors=tensors)
