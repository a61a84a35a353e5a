"""A LoRA adapter merged into its checkpoint, tensor by tensor, as the tensors are read.

    W' = W + scale · B A        scale = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA

and whatever else PEFT makes of an adapter. PEFT itself says what that is: its loader puts the adapter on a model
without weights, and every adapted layer of that model merges its own weight when it is wanted, in float32 and with one
projection in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn

from spinecli.checkpoints.checkpoint import Checkpoint, config_from, fine_tuned
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.tensors import ComputedTensor, TensorSource, held
from spinecli.checkpoints.tokenizer import has_tokenizer
from spinecli.errors import OptionError
from spinecli.lora.peft_adapter import (
    AdapterConfig,
    adapter_config,
    adapter_shapes,
    attach_adapter,
    embedding_rows,
    finite_values,
)
from spinecli.lora.peft_format import PEFT_PREFIX, WEIGHTS_NAME

_FACTORS = (".lora_A.weight", ".lora_embedding_A")
_ADAPTER = "default"
# What PEFT puts into the names of modules that it wraps.
_WRAPPINGS = (".base_layer", f".modules_to_save.{_ADAPTER}", ".original_module", ".token_adapter")


def merge(checkpoint: Checkpoint, adapter: Path, *, rounded: bool = False) -> Checkpoint:
    """`checkpoint` with the adapter in `adapter` merged; factors stay on disk until their projection is read.

    A classifier's adapter brings its head and makes a classifier of a language model or an encoder. An adapter that
    grew the vocabulary brings its embedding. A head that was tied to the embedding no longer is, if one of both
    changes.

    Args:
        rounded: sums come in the stored dtype, as a written checkpoint will hold them, instead of float32.

    Raises: OptionError if the adapter was made for another model or cannot be merged, MissingPathError,
        ForeignArtifactError, UnsafeFileError, DamagedArtifactError.
    """
    config, shapes = adapter_config(adapter), adapter_shapes(adapter)
    config.require_mergeable()
    base = _classifier(checkpoint, adapter, config, shapes)
    skeleton = base.skeleton()
    ties = dict(skeleton.all_tied_weights_keys)
    rows = embedding_rows(skeleton, shapes)
    adapted = attach_adapter(skeleton, adapter, str(base.path))
    changes = _changes(adapted.base_model.model, _Merging(base, adapter, config, ties, rounded))
    if not changes:
        raise OptionError(f"The adapter {adapter} changes nothing of {base.path}; name the one that was trained on it.")
    raw_config = dict(base.raw_config)
    if rows is not None:
        raw_config["vocab_size"] = rows
        _require_grown(base, adapter, changes, skeleton, rows)
    tensors = dict(base.tensors)
    for head, source in ties.items():
        if _still_tied(changes.get(head), changes.get(source)):
            changes.pop(head, None)
        else:
            raw_config["tie_word_embeddings"] = False
            tensors[head] = tensors[source]
    known = {name: changed for name, changed in changes.items() if name in tensors}
    return replace(
        base,
        path=adapter if rows is not None and has_tokenizer(adapter) else base.path,
        raw_config=raw_config,
        config=config_from(raw_config),
        tensors=tensors | known,
    )


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The layers that an adapter adds to, from its tensors' names."""
    return [name.removesuffix(end) for name in names for end in _FACTORS if name.endswith(end)]


@dataclass(frozen=True)
class _Merging:
    """What every merged tensor is made from."""

    base: Checkpoint
    adapter: Path
    config: AdapterConfig
    ties: Mapping[str, str]
    rounded: bool

    def stored(self, name: str) -> TensorSource:
        """The base's tensor; a tied one's is that of its partner."""
        return self.base.tensors[name] if name in self.base.tensors else self.base.tensors[self.ties[name]]

    def dtype(self, stored: TensorSource) -> torch.dtype:
        """In which a merged tensor comes."""
        return stored.dtype if self.rounded else torch.float32


@dataclass(frozen=True, eq=False)
class _RetrainedRows(ComputedTensor):
    """An embedding of which an adapter brings some rows; a head that is tied to it gets the same."""


def _changes(model: nn.Module, merging: _Merging) -> dict[str, TensorSource]:
    """What PEFT's loader has made of a model without weights: every tensor that differs from the base's."""
    changes: dict[str, TensorSource] = {}
    brought = {_plain(name.removeprefix(PEFT_PREFIX)) for name in adapter_shapes(merging.adapter)}
    for wrapped, parameter in model.named_parameters():
        name = _plain(wrapped)
        whole = "lora_" not in wrapped and ".original_module." not in wrapped
        if whole and parameter.device.type != "meta" and name in brought:
            changes[name] = held(parameter.detach().to(merging.dtype(merging.stored(name))))
    for wrapped, module in model.named_modules():
        name = f"{_plain(wrapped)}.weight"
        if isinstance(module, LoraLayer):
            stored = changes.get(name) or merging.stored(name)
            shape = tuple(module.get_base_layer().weight.shape)
            make = partial(_merged, module, wrapped, stored, merging)
            changes[name] = ComputedTensor(shape, merging.dtype(stored), make)
        elif isinstance(module, TrainableTokensWrapper):
            stored = changes.get(name) or merging.stored(name)
            rows = torch.tensor(module.token_adapter.token_indices[_ADAPTER])
            tied = module.token_adapter.tied_adapter is not None
            make = partial(_with_rows, None if tied else wrapped, rows, stored, merging)
            changes[name] = _RetrainedRows(stored.shape, merging.dtype(stored), make)
    return changes


def _merged(layer: LoraLayer, wrapped: str, stored: TensorSource, merging: _Merging) -> Tensor:
    """The weight of an adapted layer after PEFT has merged it.

    Raises: DamagedArtifactError if what the adapter brings holds NaN or infinity.
    """
    alone = copy.deepcopy(layer).to_empty(device="cpu")
    # a copy, because PEFT merges in place
    weight = nn.Parameter(stored.read().to(torch.float32, copy=True), requires_grad=False)
    alone.get_base_layer().weight = weight
    merging.config.rewrite_base(alone, _ADAPTER)
    own = {name.replace(f".{_ADAPTER}", ""): name for name in alone.state_dict() if name.startswith("lora_")}
    prefix = f"{PEFT_PREFIX}{wrapped}."
    with safe_open(merging.adapter / WEIGHTS_NAME, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118
            if name.startswith(prefix + "lora_"):
                relative = name.removeprefix(prefix)
                place = own.get(relative) or own[f"{relative}.weight"]
                value = finite_values(merging.adapter, handle.get_tensor(name)).float()
                alone.get_parameter(place).data = value
    alone.merge(adapter_names=[_ADAPTER])
    merged: Tensor = alone.get_base_layer().weight.detach()
    return merged.to(merging.dtype(stored))


def _with_rows(wrapped: str | None, rows: Tensor, stored: TensorSource, merging: _Merging) -> Tensor:
    """An embedding with the rows that an adapter brings in the place of its own."""
    with safe_open(merging.adapter / WEIGHTS_NAME, framework="pt") as handle:
        found = [name for name in handle.keys() if name.endswith("trainable_tokens_delta")]  # noqa: SIM118
        own = [name for name in found if wrapped is not None and name.startswith(f"{PEFT_PREFIX}{wrapped}.")]
        value = finite_values(merging.adapter, handle.get_tensor((own or found)[0])).float()
    return stored.read().float().index_copy(0, rows, value).to(merging.dtype(stored))


def _still_tied(head: TensorSource | None, source: TensorSource | None) -> bool:
    """Whether what becomes of two tied tensors is the same."""
    if head is None or source is None:
        return head is source
    if isinstance(head, _RetrainedRows) and isinstance(source, _RetrainedRows):
        return True
    if isinstance(head, _RetrainedRows) or head.shape != source.shape:
        return False
    return torch.equal(head.read(), source.read())


def _require_grown(
    base: Checkpoint, adapter: Path, changes: Mapping[str, TensorSource], skeleton: nn.Module, rows: int
) -> None:
    """Refuse an adapter that brings an embedding for a grown vocabulary and no head, or the other way round."""
    for name in dict.fromkeys(
        _plain(name) for name, parameter in skeleton.named_parameters() if len(parameter) == rows
    ):
        stored = base.tensors.get(name)
        if stored is not None and name not in changes and stored.shape[0] != rows:
            raise OptionError(
                f"The adapter {adapter} grew the vocabulary to {rows} tokens and brings no {name}; save it with its "
                "embedding layers."
            )


def _plain(wrapped: str) -> str:
    """A module's or tensor's name without what PEFT puts around it."""
    for wrapping in _WRAPPINGS:
        wrapped = wrapped.replace(wrapping, "")
    return wrapped


def _classifier(
    checkpoint: Checkpoint, adapter: Path, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Checkpoint:
    """The checkpoint as the classifier that the adapter makes of it, with its head; else as it is."""
    if not config.classifies:
        return checkpoint
    head = checkpoint.family.classification_head + "."
    trained = {name: _plain(name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.", ".")) for name in shapes}
    with safe_open(adapter / WEIGHTS_NAME, framework="pt") as handle:
        values = {
            plain: handle.get_tensor(name) for name, plain in trained.items() if ".lora_" not in plain and head in plain
        }
    settings: dict[str, Any] = {}
    last = values.get(head + "weight")
    if last is not None and checkpoint.labels != len(last):
        names = [f"LABEL_{index}" for index in range(len(last))]
        settings = {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
        }
    try:
        return fine_tuned(checkpoint, Task.classification, values, settings)
    except ValueError as error:
        raise OptionError(
            f"The adapter {adapter} does not fit {checkpoint.path} ({error}); name the checkpoint that it was trained "
            "on."
        ) from error
