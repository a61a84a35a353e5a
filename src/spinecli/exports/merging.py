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

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn

from spinecli.checkpoints.checkpoint import Checkpoint, config_from
from spinecli.checkpoints.tensors import ComputedTensor, TensorSource, held
from spinecli.checkpoints.tokenizer import has_tokenizer
from spinecli.errors import OptionError
from spinecli.lora.peft_adapter import (
    AdapterConfig,
    adapted_classifier,
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
    base = adapted_classifier(checkpoint, adapter, str(checkpoint.path)) if config.classifies else checkpoint
    skeleton = base.skeleton()
    ties = dict(skeleton.all_tied_weights_keys)
    rows = embedding_rows(skeleton, shapes)
    adapted = attach_adapter(skeleton, adapter, str(base.path))
    merging = _Merging(base, adapter, config, ties, rounded)
    bases = _brought_bases(adapted.base_model.model, merging, shapes)
    changes = _changes(adapted.base_model.model, merging, bases, shapes)
    if not changes:
        raise OptionError(f"The adapter {adapter} changes nothing of {base.path}; name the one that was trained on it.")
    raw_config = dict(base.raw_config)
    if rows is not None:
        raw_config["vocab_size"] = rows
    tensors = dict(base.tensors)
    for head, source in ties.items():
        if _still_tied(changes.get(head), changes.get(source)):
            changes.pop(head, None)
        else:
            raw_config["tie_word_embeddings"] = False
            tensors[head] = bases.get(source, tensors[source])
    known = {name: changed for name, changed in changes.items() if name in tensors}
    return replace(
        base,
        path=adapter if rows is not None and has_tokenizer(adapter) else base.path,
        companions=base.companions or base.path,
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
    """An embedding or a head of which an adapter brings some rows."""

    follows: bool = False
    """The rows are those of the tensor that it is tied to."""


def _brought_bases(
    model: nn.Module, merging: _Merging, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorSource]:
    """Weights of the base that the adapter brings with it, such as those of a vocabulary that grew."""
    found: dict[str, TensorSource] = {}
    for wrapped, parameter in model.named_parameters():
        if PEFT_PREFIX + wrapped in shapes and parameter.device.type != "meta":
            name = _plain(wrapped)
            found[name] = held(parameter.detach().to(merging.dtype(merging.stored(name))))
    return found


def _changes(
    model: nn.Module,
    merging: _Merging,
    bases: Mapping[str, TensorSource],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, TensorSource]:
    """What PEFT's loader has made of a model without weights: every tensor that differs from the base's."""
    changes = {name: value for name, value in bases.items() if f"{PEFT_PREFIX}{_original(name)}" not in shapes}
    for wrapped, parameter in model.named_parameters():
        if f".modules_to_save.{_ADAPTER}." in wrapped and parameter.device.type != "meta":
            name = _plain(wrapped)
            changes[name] = held(parameter.detach().to(merging.dtype(merging.stored(name))))
    for wrapped, module in model.named_modules():
        name = f"{_plain(wrapped)}.weight"
        if isinstance(module, LoraLayer):
            stored = bases.get(name) or merging.stored(name)
            shape = tuple(module.get_base_layer().weight.shape)
            make = partial(_merged, module, wrapped, stored, merging)
            changes[name] = ComputedTensor(shape, merging.dtype(stored), make)
        elif isinstance(module, TrainableTokensWrapper):
            stored = bases.get(name) or merging.stored(name)
            rows = torch.tensor(module.token_adapter.token_indices[_ADAPTER])
            tied = module.token_adapter.tied_adapter is not None
            make = partial(_with_rows, None if tied else wrapped, rows, stored, merging)
            changes[name] = _RetrainedRows(stored.shape, merging.dtype(stored), make, follows=tied)
    return changes


def _original(name: str) -> str:
    """What PEFT calls the base's tensor in a module that is trained whole."""
    module, _, kind = name.rpartition(".")
    return f"{module}.original_module.{kind}"


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
    if isinstance(head, _RetrainedRows):
        return head.follows
    return head.shape == source.shape and torch.equal(head.read(), source.read())


def _plain(wrapped: str) -> str:
    """A module's or tensor's name without what PEFT puts around it."""
    for wrapping in _WRAPPINGS:
        wrapped = wrapped.replace(wrapping, "")
    return wrapped
