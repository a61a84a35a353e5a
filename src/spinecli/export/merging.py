"""A LoRA adapter added to its checkpoint, tensor by tensor, as the tensors are read.

    W' = W + scale · B A        scale = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA

as PEFT merges it, but in float32 and with one projection in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.finetuned import fine_tuned
from spinecli.checkpoints.reader import read_json_object
from spinecli.checkpoints.tensors import MadeTensor, TensorSource
from spinecli.errors import DamagedArtifactError, OptionError, SpineError
from spinecli.evaluation.adapters import CONFIG_NAME, WEIGHTS_NAME, adapter_shapes
from spinecli.lora.peft_format import PEFT_PREFIX

_A, _B = ".lora_A.weight", ".lora_B.weight"
# Settings of PEFT under which the formula above is not what the adapter computes.
_OTHER_FORMULAS = ("use_dora", "lora_bias", "alora_invocation_tokens", "use_qalora", "arrow_config", "use_bdlora")


@dataclass(frozen=True)
class LowRank:
    """Where the factors of one projection lie and how much of their product is added."""

    file: Path
    module: str
    """The projection's name in the file."""
    scale: float
    transposed: bool
    """The projection's weight is (inputs, outputs), as GPT-2 has it."""

    def product(self) -> Tensor:
        """The product, scaled, in the layout of the weight, float32.

        Raises: DamagedArtifactError if a factor holds NaN or infinity.
        """
        with safe_open(self.file, framework="pt") as handle:
            a: Tensor = handle.get_tensor(self.module + _A).float()
            b: Tensor = handle.get_tensor(self.module + _B).float()
        if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
            raise DamagedArtifactError(f"{self.file} holds NaN or infinite values; train the adapter again.")
        product = self.scale * (b @ a)
        return product.T if self.transposed else product


def merge(checkpoint: Checkpoint, adapter: Path, *, rounded: bool = False) -> Checkpoint:
    """`checkpoint` with the adapter in `adapter` merged; factors stay on disk until their projection is read.

    A classifier's adapter brings its head and makes a classifier of a language model or an encoder.

    Args:
        rounded: sums come in the stored dtype, as a written checkpoint will hold them, instead of float32.

    Raises: OptionError if the adapter was made for another model or is not LoRA of linear layers, MissingPathError,
        ForeignArtifactError, UnsafeFileError, DamagedArtifactError.
    """
    shapes = adapter_shapes(adapter)
    config = _config(adapter)
    named = {name: _plain(name) for name in shapes}
    modules = adapted_modules(shapes)
    factors = {module + end for module in modules for end in (_A, _B)}
    replaced = {named[name]: name for name in shapes if name not in factors}
    base = _with_replaced(checkpoint, adapter, config, replaced)
    tensors = dict(base.tensors)
    for module in modules:
        place = _place(base, adapter, _plain(module) + ".weight")
        stored, addition = base.tensors[place], _addition(base, adapter, config, shapes, module)
        dtype = stored.dtype if rounded else torch.float32
        tensors[place] = MadeTensor(stored.shape, dtype, partial(_sum, stored, addition, dtype))
    return replace(base, tensors=tensors)


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The projections that an adapter adds to, from its tensors' names."""
    return [name.removesuffix(_A) for name in names if name.endswith(_A)]


def _sum(stored: TensorSource, addition: LowRank, dtype: torch.dtype) -> Tensor:
    return (stored.read().float() + addition.product()).to(dtype)


def _config(adapter: Path) -> dict[str, Any]:
    try:
        config = read_json_object(adapter / CONFIG_NAME)
    except SpineError as error:
        raise DamagedArtifactError(f"{adapter / CONFIG_NAME} is not readable JSON; fetch the adapter again.") from error
    if config.get("peft_type") != "LORA":
        raise OptionError(f"The adapter {adapter} is {config.get('peft_type')!r}; spine export merges LoRA only.")
    for key in _OTHER_FORMULAS:
        if config.get(key):
            raise OptionError(f"The adapter {adapter} was trained with {key}; merge it with PEFT before the export.")
    return config


def _plain(name: str) -> str:
    """A tensor's name without what PEFT puts around it."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _with_replaced(
    checkpoint: Checkpoint, adapter: Path, config: dict[str, Any], replaced: Mapping[str, str]
) -> Checkpoint:
    """The checkpoint with the tensors that the adapter has trained as a whole."""
    classifies = config.get("task_type") == "SEQ_CLS"
    if not replaced and not classifies:
        return checkpoint
    if lost := sorted(name for name in replaced if ".lora_" in name):
        raise OptionError(f"The adapter {adapter} adapts {lost[0]}, no linear layer; merge it with PEFT instead.")
    with safe_open(adapter / WEIGHTS_NAME, framework="pt") as handle:
        values = {name: handle.get_tensor(stored) for name, stored in replaced.items()}
    if not all(bool(torch.isfinite(value).all()) for value in values.values()):
        raise DamagedArtifactError(f"{adapter} holds NaN or infinite values; train the adapter again.")
    task = Task.classification if classifies else checkpoint.task
    head = values.get(checkpoint.family.classification_head + ".weight") if classifies else None
    settings: dict[str, Any] = {}
    if head is not None and checkpoint.labels != len(head):
        names = [f"LABEL_{index}" for index in range(len(head))]
        settings = {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
        }
    try:
        return fine_tuned(checkpoint, task, values, settings)
    except ValueError as error:
        raise _misfit(checkpoint, adapter, str(error)) from error


def _addition(
    checkpoint: Checkpoint, adapter: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], module: str
) -> LowRank:
    place = _place(checkpoint, adapter, _plain(module) + ".weight")
    a, b = shapes[module + _A], shapes.get(module + _B)
    if b is None or len(a) != 2 or len(b) != 2 or b[1] != a[0]:
        raise OptionError(f"The adapter {adapter} has no two fitting factors for {module}; train it again.")
    shape = checkpoint.tensors[place].shape
    transposed = bool(config.get("fan_in_fan_out"))
    if shape != ((a[1], b[0]) if transposed else (b[0], a[1])):
        raise _misfit(checkpoint, adapter, f"{place} has shape {list(shape)}, its product {[b[0], a[1]]}")
    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), _plain(module)), config.get("lora_alpha", 8)))
    scale = alpha / (math.sqrt(a[0]) if config.get("use_rslora") else a[0])
    return LowRank(adapter / WEIGHTS_NAME, module, scale, transposed)


def _place(checkpoint: Checkpoint, adapter: Path, name: str) -> str:
    """What the checkpoint calls a tensor, which an adapter may name with or without the base model's prefix."""
    prefix = checkpoint.family.blocks.partition(".")[0] + "."
    for known in (name, name.removeprefix(prefix), prefix + name):
        if known in checkpoint.tensors:
            return known
    raise _misfit(checkpoint, adapter, f"its tensor {name} has no place there")


def _misfit(checkpoint: Checkpoint, adapter: Path, reason: str) -> OptionError:
    return OptionError(
        f"The adapter {adapter} does not fit {checkpoint.path} ({reason}); name the checkpoint that it was trained on."
    )
