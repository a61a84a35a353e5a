"""The answers of a tune run on disk, one small file a block, until they are folded into the output checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinecli.artifacts.whole_file import whole_file
from spinecli.checkpoints.checkpoint import Checkpoint, config_from
from spinecli.checkpoints.skeleton import build_skeleton, stored_shapes
from spinecli.checkpoints.tensors import ComputedTensor
from spinecli.pruning.recovery.block import TunedBlock
from spinecli.pruning.recovery.least_squares import LayerRecovery


@dataclass(frozen=True)
class TunedWeights:
    """Answers by block of the student, in the dtype in which they will be stored."""

    directory: Path

    def save(self, index: int, dense_index: int, tuned: TunedBlock, student: Checkpoint) -> None:
        """Keep what was found for block `index` of the student, which was block `dense_index` of the teacher."""
        tensors: dict[str, Tensor] = {}
        layers: list[JsonValue] = []
        for name, layer in tuned.layers(student.family).items():
            weight, bias = layer.solution.weight, layer.solution.bias
            stored = weight.T if student.family.transposed else weight
            tensors[f"{name}.weight"] = stored.to("cpu", student.storage_dtype).contiguous()
            if bias is not None:
                tensors[f"{name}.bias"] = bias.to("cpu", student.storage_dtype)
            if layer.solution.scales is not None:
                tensors[f"{name}.scales"] = layer.solution.scales.cpu()
            layers.append(_layer_report(index, dense_index, name, layer))
        with whole_file(self._path(index)) as part:
            save_file(tensors, part, metadata={"layers": json.dumps(layers)})

    def report(self, index: int) -> list[JsonValue]:
        """What was chosen for the layers of block `index`, and what it was worth."""
        with safe_open(self._path(index), framework="pt") as handle:
            layers: list[JsonValue] = json.loads(handle.metadata()["layers"])
            return layers

    def names(self, index: int) -> list[str]:
        """Names of the tensors kept for block `index`, relative to the block."""
        with safe_open(self._path(index), framework="pt") as handle:
            return list(handle.keys())

    def read(self, index: int, name: str) -> Tensor:
        """One of them."""
        with safe_open(self._path(index), framework="pt") as handle:
            value: Tensor = handle.get_tensor(name)
            return value

    def scales(self, blocks: int) -> dict[str, Tensor]:
        """Scales of every layer that got a mask, by `block.<index>.<projection>`."""
        return {
            f"block.{index}.{name.removesuffix('.scales')}": self.read(index, name)
            for index in range(blocks)
            for name in self.names(index)
            if name.endswith(".scales")
        }

    def _path(self, index: int) -> Path:
        return self.directory / f"tuned-{index:05d}.safetensors"


def tuned_checkpoint(student: Checkpoint, tuned: TunedWeights, bias_switches: tuple[str, ...]) -> Checkpoint:
    """The student with the answers in place of its own projections; they are read from their files as they are needed.

    Biases that a switch brings into being and that no answer fills are zero.
    """
    raw_config = {**student.raw_config, **dict.fromkeys(bias_switches, True)}
    config, dtype = config_from(raw_config), student.storage_dtype
    expected = stored_shapes(build_skeleton(config, student.task))
    answers: dict[str, Callable[[], Tensor]] = {
        f"{student.block_prefix(index)}{name}": partial(tuned.read, index, name)
        for index in range(student.blocks)
        for name in tuned.names(index)
    }
    tensors = dict(student.tensors)
    for name, shape in expected.items():
        if name in answers:
            tensors[name] = ComputedTensor(shape, dtype, answers[name])
        elif name not in tensors:
            tensors[name] = ComputedTensor(shape, dtype, partial(torch.zeros, shape, dtype=dtype))
    return replace(student, raw_config=raw_config, config=config, tensors=tensors)


def _layer_report(index: int, dense_index: int, name: str, layer: LayerRecovery) -> JsonValue:
    return {
        "block": index,
        "dense_block": dense_index,
        "layer": name,
        "choice": layer.choice,
        "error_before": layer.error_before,
        "error_after": layer.error_after,
    }
