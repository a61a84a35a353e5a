"""The frozen base model, loaded once and lent to one device after another.

Devices differ only in their adapter, their classification head and what was cut off their copy. `BaseModel.lent` puts
these in place and takes them away again; the dense weights are shared and never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import kept_rows
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.config import Task
from spinecli.errors import DamagedCheckpointError, NonFiniteWeightsError, OptionError
from spinecli.federation.client.adapted_linear import AdaptedLinear
from spinecli.federation.client.local_pruning import PrunableUnits, kept_units
from spinecli.lora.factors import Adapter, Factors, target_projections


def load_task_model(
    checkpoint: Checkpoint, task: Task, labels: int, pad_id: int, seed: int, compute: ComputeOptions
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The whole task model, frozen, in evaluation mode, and the names of the modules that make up its head.

    The head is the classifier and what else the checkpoint lacks, such as BERT's pooler. What is lacking is drawn from
    `seed`, and so is the last layer of a classifier that was trained for another number of labels.

    Raises: NonFiniteWeightsError, DamagedCheckpointError; OptionError if a language model is asked for and is none.
    """
    transformers_logging.disable_progress_bar()
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config.pad_token_id = pad_id
    if task == "classification":
        checkpoint.family.require_classifier()
        config.num_labels = labels
    kind = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    model, info = kind.from_pretrained(
        checkpoint.path,
        config=config,
        dtype=compute.dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    head: tuple[str, ...] = ()
    classifier = checkpoint.family.classification_head
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    if strange := sorted(name for name in mismatched if not name.startswith(classifier + ".")):
        raise DamagedCheckpointError(f"{strange[0]} in {checkpoint.path} has another shape than its config.json says.")
    missing = sorted(info["missing_keys"] | mismatched)
    missing = [name for name in missing if not _filled(model, name, checkpoint)]
    if task == "language" and missing:
        raise OptionError(f"{checkpoint.path} lacks {missing[0]} and is no language model; name one that is.")
    if task == "classification":
        _draw(model, missing, seed)
        others = {name.rpartition(".")[0] for name in missing if not name.startswith(classifier + ".")}
        # PEFT trains and saves every module whose name ends in the head's, such as DistilBERT's `pre_classifier`
        others |= {name for name, _ in model.named_children() if name != classifier and name.endswith(classifier)}
        head = (classifier, *sorted(others))
    _require_finite(model, checkpoint.path)
    frozen: PreTrainedModel = model.to(compute.device).eval().requires_grad_(False)
    for name in head:
        _keep_precise(frozen.get_submodule(name))
    return frozen, head


def _filled(model: PreTrainedModel, name: str, checkpoint: Checkpoint) -> bool:
    """Fill in a tensor that the checkpoint has under another name: an embedding, stored as the head tied to it."""
    parameter = model.get_parameter(name)
    stored = checkpoint.tensors.get(name)
    if stored is None or stored.shape != tuple(parameter.shape):
        return False
    parameter.data.copy_(stored.read())
    return True


def _draw(model: PreTrainedModel, missing: Sequence[str], seed: int) -> None:
    """Weights that the checkpoint lacks: normal with the model's own deviation, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
    parameters = dict(model.named_parameters())
    for name in missing:
        drawn = torch.randn(parameters[name].shape, generator=generator) * deviation
        parameters[name].data.copy_(drawn if drawn.dim() > 1 else torch.zeros_like(drawn))


def _keep_precise(module: nn.Module) -> None:
    """What is trained stays in float32 whatever the base is kept in, and takes its inputs as float32."""

    def widen(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.float() if isinstance(value, Tensor) else value for value in arguments)

    module.float().register_forward_pre_hook(widen)


def _require_finite(model: PreTrainedModel, path: Path) -> None:
    for name, value in model.named_parameters():
        if value.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
            raise NonFiniteWeightsError(f"{name} in {path} holds NaN or infinite values; fetch the checkpoint again.")


Head = Mapping[str, Tensor]
"""Trained tensors outside the blocks, by name in the model: the classification head. Empty for language models."""


class BaseModel:
    """A task model whose coupled projections can be cut and adapted per device.

    Args:
        checkpoint: the frozen base.
        task: `classification` puts a head of `labels` outputs on it, `language` keeps the language model's own.
        labels: number of labels; ignored for `language`.
        targets: which projections carry LoRA, see `lora.targets`.
        pad_id: token that fills up short rows.
        seed: of a head that the checkpoint does not bring.

    Raises: NonFiniteWeightsError, DamagedCheckpointError; OptionError if a language model is asked for and is none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: Task,
        labels: int,
        targets: str = "all",
        pad_id: int = 0,
        seed: int = 0,
        compute: ComputeOptions | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.task: Task = task
        self.family = checkpoint.family
        self.compute = compute or ComputeOptions()
        self.model, self.head_modules = load_task_model(checkpoint, task, labels, pad_id, seed, self.compute)
        holder = self.model.get_submodule(self.family.blocks)
        self.blocks = [holder[index] for index in range(checkpoint.blocks)]
        self._projections = {
            name: self._adapt(name)
            for index in range(checkpoint.blocks)
            for name in (
                self.projection_name(index, relative)
                for relative in self.family.projections
                if checkpoint.has(index, relative)
            )
        }
        self.targets = target_projections(self.family, targets)

    @cached_property
    def cuts(self) -> PrunableUnits:
        """What can leave the blocks; OptionError if they differ in width."""
        return PrunableUnits.of(self.checkpoint)

    def kept_units(self, masks: Masks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Kept rows and kept columns of every target projection that loses some, by full name, as indices."""
        return kept_units(masks, self.family, self.checkpoint.shapes, self.target_shapes())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def projection_name(self, block: int, relative: str) -> str:
        """Full name of a projection in the task model."""
        return f"{self.family.blocks}.{block}.{relative}"

    def projection(self, block: int, relative: str) -> AdaptedLinear:
        """A coupled projection of a block, as it is at the moment."""
        return self._projections[self.projection_name(block, relative)]

    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every adapted projection when nothing is cut, by full name, in the model's order."""
        return {
            self.projection_name(index, relative): self.projection(index, relative).dense_shape
            for index in range(self.checkpoint.blocks)
            for relative in self.targets
            if self.checkpoint.has(index, relative)
        }

    def head(self) -> dict[str, Tensor]:
        """A copy of the head's tensors as they are now, by full name."""
        return {name: value.detach().clone() for name, value in self._head_parameters()}

    def _head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{module}.{name}", value)
            for module in self.head_modules
            for name, value in self.model.get_submodule(module).named_parameters()
        ]

    @contextmanager
    def lent(self, head: Head, masks: Masks | None = None, folded: Adapter | None = None) -> Iterator[None]:
        """The model with one device's head and cuts, for as long as the context lasts.

        Args:
            folded: a fixed change of the weights, added before they are cut (FLoRA's folded rounds).
        """
        kept = self.head()
        try:
            self._load_head(head)
            for name, factors in (folded or {}).items():
                self._projections[name].shift(factors.product().to(self.device))
            if masks is not None:
                self.cut(masks)
            yield
        finally:
            for projection in self._projections.values():
                projection.restore()
            self._load_head(kept)
            for _, parameter in self._head_parameters():
                parameter.requires_grad_(False).grad = None

    def cut(self, masks: Masks) -> None:
        """Take the units that `masks` removes off the weights, and off factors that are already attached.

        Factors that are attached later come in the shape of the cut weights.
        """
        for index, mask in enumerate(masks.blocks):
            for relative, (axis, kept) in kept_rows(self.family, mask, self.checkpoint.shapes[index]).items():
                if not self.checkpoint.has(index, relative):
                    continue
                projection = self.projection(index, relative)
                if len(kept) < projection.dense_shape[axis]:
                    projection.narrow(axis, kept.to(self.device))

    def attach(self, adapter: Adapter, scale: float = 1.0, *, train_a: bool = True, trainable: bool = True) -> None:
        """Put an adapter's factors beside the weights.

        Args:
            scale: LoRA's alpha / rank, which is taken out of B for as long as the factors are attached.
        """
        for name, factors in adapter.items():
            self._projections[name].attach(factors.a, factors.b / scale, scale, train_a=train_a, trainable=trainable)

    def attached(self) -> dict[str, Factors]:
        """The factors as they are now, the scale folded into B, on the CPU."""
        return {
            name: Factors(projection.a.detach().cpu().clone(), (projection.b.detach() * projection.scale).cpu())
            for name, projection in self._projections.items()
            if projection.a is not None and projection.b is not None
        }

    def trainable(self) -> list[nn.Parameter]:
        """What a device trains: factors, then the head."""
        factors = [
            factor
            for projection in self._projections.values()
            for factor in (projection.a, projection.b)
            if factor is not None and factor.requires_grad
        ]
        heads = [parameter for _, parameter in self._head_parameters()]
        for parameter in heads:
            parameter.requires_grad_(True)
        return [*factors, *heads]

    def _load_head(self, head: Head) -> None:
        with torch.no_grad():
            for name, parameter in self._head_parameters():
                parameter.copy_(head[name])

    def _adapt(self, name: str) -> AdaptedLinear:
        """Replace one Linear of the model by an AdaptedLinear around it."""
        holder, _, attribute = name.rpartition(".")
        linear = self.model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a Linear")
        adapted = AdaptedLinear(linear)
        setattr(self.model.get_submodule(holder), attribute, adapted)
        return adapted
