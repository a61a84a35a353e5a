"""A checkpoint as a task model in memory: frozen, with a head that is trained, whatever the checkpoint brings of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from spinecli.calibration.stream import ComputeOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import DamagedCheckpointError, NonFiniteWeightsError, OptionError
from spinecli.federation.data.columns import Task


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
