"""The models of an evaluation: opened by their headers, loaded only when something must be computed with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinecli.artifacts.manifest import MANIFEST_NAME, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import model_size
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.errors import NonFiniteWeightsError, UnsupportedFamilyError, UserError
from spinecli.evaluation.adapters import adapter_shapes, attach_adapter
from spinecli.evaluation.results import Weights

# Tokens of context at which the cost of attention scores is counted.
FLOPS_CONTEXT = 256


@dataclass(frozen=True, eq=False)
class Subject:
    """One model under evaluation."""

    label: str
    """Short and unique among the models of an evaluation."""
    reference: str
    """As the user named it."""
    checkpoint: Checkpoint
    adapter: Path | None = None

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self.checkpoint.path

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model was made for; None if its configuration does not say."""
        value = getattr(self.checkpoint.config, "max_position_embeddings", None)
        return int(value) if value else None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.checkpoint.config.vocab_size)


def open_subjects(references: Sequence[tuple[str, Path | None]]) -> list[Subject]:
    """Open models by (reference, adapter); no weights are read.

    Raises: UnsupportedFamilyError for what is no causal language model, and whatever `resolve_checkpoint`,
    `Checkpoint.open` and `adapter_shapes` raise.
    """
    opened = []
    for reference, adapter in references:
        if adapter is not None:
            adapter_shapes(adapter)
        checkpoint = Checkpoint.open(resolve_checkpoint(reference))
        if checkpoint.task is not Task.causal_lm:
            raise UnsupportedFamilyError(
                f"{reference} is no causal language model but a {checkpoint.task.value} checkpoint, which spine eval "
                "cannot measure; name a language model."
            )
        opened.append((reference, checkpoint, adapter))
    names = [_name(reference, adapter) for reference, _, adapter in opened]
    return [
        Subject(label, reference, checkpoint, adapter)
        for label, (reference, checkpoint, adapter) in zip(_unique(names, references), opened, strict=True)
    ]


def weights_of(subject: Subject) -> Weights:
    """Counts from the headers of the checkpoint and the adapter."""
    checkpoint = subject.checkpoint
    sizes = {name: torch.Size(stored.shape).numel() for name, stored in checkpoint.tensors.items()}
    in_blocks = {name for index in range(checkpoint.blocks) for name in checkpoint.block_names(index).values()}
    model = model_size(checkpoint, checkpoint.blocks, checkpoint.shape, FLOPS_CONTEXT)
    shapes = adapter_shapes(subject.adapter).values() if subject.adapter else ()
    adapter = sum(torch.Size(shape).numel() for shape in shapes)
    return Weights(
        parameters=sum(sizes.values()),
        block_parameters=sum(sizes[name] for name in in_blocks),
        adapter_parameters=adapter,
        bytes_on_disk=checkpoint.bytes,
        flops_per_token=model.flops_per_token + 2 * adapter,
    )


def load_model(subject: Subject, *, device: str, dtype: str) -> PreTrainedModel:
    """The whole model in memory, with its adapter, in evaluation mode.

    Raises: NonFiniteWeightsError, and everything `attach_adapter` raises.
    """
    model = AutoModelForCausalLM.from_pretrained(
        subject.path,
        config=subject.checkpoint.config,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    for name, value in model.named_parameters():
        if value.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
            raise NonFiniteWeightsError(
                f"{name} in {subject.path} holds NaN or infinite values as {dtype}; the checkpoint is unusable, or "
                "needs --dtype float32."
            )
    model = model.to(device).eval().requires_grad_(False)
    return model if subject.adapter is None else attach_adapter(model, subject.adapter, subject.reference)


def dense_reference(subject: Subject) -> str | None:
    """How the checkpoint that this one was made from was named; None if spine did not write this one."""
    if not (subject.path / MANIFEST_NAME).is_file():
        return None
    try:
        lineage = read_manifest(subject.path).lineage
    except UserError:  # it only serves a note and a default here; `provenance` and `spine inspect` judge it
        return None
    return lineage[0].reference if lineage else None


def default_text(subject: Subject) -> str:
    """The text to measure on when none is named: the built-in model's own language for it and its descendants."""
    origin = dense_reference(subject) or subject.reference
    return "builtin:tiny-evaluation" if origin.startswith("builtin:") else "builtin:python-docs"


def _name(reference: str, adapter: Path | None) -> str:
    name = Path(reference).expanduser().resolve().name if Path(reference).expanduser().is_dir() else reference
    return f"{name} + {adapter.name}" if adapter else name


def _unique(names: list[str], references: Sequence[tuple[str, Path | None]]) -> list[str]:
    """Names that occur twice become full references, and what still occurs twice is numbered."""
    counts = Counter(names)
    labels = []
    for name, (reference, adapter) in zip(names, references, strict=True):
        full = f"{reference} + {adapter}" if adapter else reference
        labels.append(name if counts[name] == 1 else full)
    repeated = Counter(labels)
    seen: Counter[str] = Counter()
    for position, label in enumerate(labels):
        seen[label] += 1
        if repeated[label] > 1 and seen[label] > 1:
            labels[position] = f"{label} ({seen[label]})"
    return labels
