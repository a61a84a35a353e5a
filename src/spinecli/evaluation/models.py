"""The models of an evaluation: opened by their headers, loaded only when something must be computed with them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, Step, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import size_of
from spinecli.checkpoints.cut_picture import BlockCut, block_cuts
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.skeleton import auto_class
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.tokenizer import (
    fitting_tokenizer,
    has_tokenizer,
    padding_id,
    require_fitting_tokenizer,
    tokenizer_of,
)
from spinecli.data.rows import opening_of
from spinecli.errors import NonFiniteWeightsError, OptionError, UnsupportedFamilyError, UserError
from spinecli.evaluation.results import Weights
from spinecli.lora.peft_adapter import (
    adapted_classifier,
    adapter_config,
    adapter_shapes,
    attach_adapter,
    embedding_rows,
)
from spinecli.lora.peft_format import PEFT_PREFIX


def padded_classifier(checkpoint: Checkpoint) -> Checkpoint:
    """A classifier whose configuration names a padding token, so that rows of different lengths form batches.

    Raises: OptionError if it does not choose one of several labels; TokenizerError.
    """
    config = checkpoint.config
    # what transformers calls regression is a single output
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise OptionError(
            f"{checkpoint.path} does not choose one of several labels (num_labels {config.num_labels}, problem_type "
            f"{config.problem_type}), which is all that spine measures of classifiers; name another checkpoint."
        )
    padding = config.pad_token_id
    if padding is not None and padding >= 0:
        return checkpoint
    config = copy.deepcopy(config)
    config.pad_token_id = padding_id(tokenizer_of(checkpoint))
    return replace(checkpoint, config=config)


def label_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a classifier calls its labels, in the order of its outputs; LABEL_0 and so on where it does not say."""
    names: Mapping[int, str] = checkpoint.config.id2label
    return tuple(str(names.get(index, f"LABEL_{index}")) for index in range(checkpoint.labels or 0))


# Tokens of context at which the cost of attention scores is counted.
FLOPS_CONTEXT = 256

_JOINED = "joined-checkpoint"


@dataclass(frozen=True, eq=False)
class Subject:
    """One model under evaluation."""

    label: str
    """Short and unique among the models of an evaluation."""
    reference: str
    """As the user named it."""
    checkpoint: Checkpoint
    """With the head of its adapter, if that makes a classifier of it."""
    adapter: Path | None = None

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding, the adapter's where that brings one."""
        own = int(self.checkpoint.config.vocab_size)
        if self.adapter is None:
            return own
        return embedding_rows(self.checkpoint.skeleton(), adapter_shapes(self.adapter)) or own

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's, or that of an adapter that grew the vocabulary. Raises TokenizerError."""
        grown = self.adapter is not None and self.vocabulary != int(self.checkpoint.config.vocab_size)
        own = self.adapter if grown and self.adapter and has_tokenizer(self.adapter) else self.path
        return fitting_tokenizer(own, self.vocabulary)

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The special tokens that its tokenizer puts in front of a text; none without a tokenizer."""
        return opening_of(self.tokenizer) if has_tokenizer(self.path) else ()

    @property
    def classifies(self) -> bool:
        """Whether it is a classifier; else it is a causal language model."""
        return self.checkpoint.task is Task.classification

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self.checkpoint.path

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model was made for; None if its configuration does not say."""
        return self.checkpoint.positions


def open_subjects(references: Sequence[tuple[str, Path | None]]) -> list[Subject]:
    """Open models by (reference, adapter); no weights are read but those of a head that an adapter brings.

    Raises: UnsupportedFamilyError for what is neither a causal language model nor a classifier, OptionError if there
    are some of both, and whatever `resolve_checkpoint`, `Checkpoint.open` and `adapter_shapes` raise.
    """
    opened = [_open(reference, adapter) for reference, adapter in references]
    names = [_name(reference, adapter) for reference, adapter in references]
    subjects = [
        Subject(label, reference, checkpoint, adapter)
        for label, (reference, adapter), checkpoint in zip(
            unique_labels(names, [_full_name(*each) for each in references]), references, opened, strict=True
        )
    ]
    classifier = next((subject for subject in subjects if subject.classifies), None)
    language_model = next((subject for subject in subjects if not subject.classifies), None)
    if classifier and language_model:
        raise OptionError(
            f"{classifier.label} is a classifier and {language_model.label} is a language model, which no measure "
            "compares; name models of one kind."
        )
    return subjects


def _open(reference: str, adapter: Path | None) -> Checkpoint:
    if adapter is not None:
        adapter_shapes(adapter)
    checkpoint = Checkpoint.open(resolve_checkpoint(reference))
    require_fitting_tokenizer(checkpoint)
    if adapter is not None and adapter_config(adapter).classifies:
        # PEFT puts the head into the loaded model; this one's values serve counting only
        return padded_classifier(adapted_classifier(checkpoint, adapter, reference))
    if checkpoint.task is Task.classification:
        return padded_classifier(checkpoint)
    if checkpoint.task is not Task.causal_lm:
        raise UnsupportedFamilyError(
            f"{reference} is a {checkpoint.task.value} checkpoint and gives no output that spine eval measures; name "
            "a language model or a classifier."
        )
    return checkpoint


def weights_of(subject: Subject) -> Weights:
    """Counts from the headers of the checkpoint and the adapter."""
    checkpoint = subject.checkpoint
    sizes = {name: torch.Size(stored.shape).numel() for name, stored in checkpoint.tensors.items()}
    in_blocks = {name for index in range(checkpoint.blocks) for name in checkpoint.block_names(index).values()}
    model = size_of(checkpoint, FLOPS_CONTEXT)
    shapes = adapter_shapes(subject.adapter) if subject.adapter else {}
    # the head that an adapter brings is already among the classifier's own tensors
    added = [shape for name, shape in shapes.items() if name.removeprefix(PEFT_PREFIX) not in sizes]
    adapter = sum(torch.Size(shape).numel() for shape in added)
    return Weights(
        parameters=sum(sizes.values()),
        block_parameters=sum(sizes[name] for name in in_blocks),
        adapter_parameters=adapter,
        bytes_on_disk=checkpoint.bytes,
        flops_per_token=model.flops_per_token + 2 * adapter,
    )


def cut_of(subject: Subject) -> tuple[BlockCut, ...]:
    """What the checkpoint keeps of the blocks that it was cut from; empty if it does not say."""
    try:
        return block_cuts(Masks.load(subject.path))
    except UserError:  # no masks, or damaged ones, on which no figure depends
        return ()


def load_model(subject: Subject, *, device: str, dtype: str) -> PreTrainedModel:
    """The whole model in memory, with its adapter, in evaluation mode.

    Raises: NonFiniteWeightsError, and everything `attach_adapter` raises.
    """
    model: PreTrainedModel = auto_class(subject.checkpoint.task).from_pretrained(
        subject.path,
        config=subject.checkpoint.config,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        # a head that an adapter replaces may be of another size
        ignore_mismatched_sizes=subject.classifies and subject.adapter is not None,
    )
    if subject.classifies:
        model.config.use_cache = False  # every row is read once
    for name, value in model.named_parameters():
        if value.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
            raise NonFiniteWeightsError(
                f"{name} in {subject.path} holds NaN or infinite values as {dtype}; the checkpoint is unusable, or "
                "needs --dtype float32."
            )
    model = model.to(device).eval().requires_grad_(False)
    return model if subject.adapter is None else attach_adapter(model, subject.adapter, subject.reference)


def dense_reference(subject: Subject) -> str | None:
    """How the checkpoint that this one was made from was named; None if spine did not write this one.

    A classifier's is the one that was trained to classify, because what came before it may be a language model.
    """
    if not (subject.path / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(subject.path)
    except UserError:  # it only serves a note and a default here; `run_of` and `spine inspect` judge it
        return None
    steps = _steps_after_training(manifest) if subject.classifies else manifest.lineage
    return steps[0].reference if steps else None


def _steps_after_training(manifest: Manifest) -> tuple[Step, ...]:
    """The steps from the last joined checkpoint on; all of them if none is one."""
    if manifest.kind == _JOINED:
        return ()
    joined = [index for index, step in enumerate(manifest.lineage) if step.kind == _JOINED]
    return manifest.lineage[joined[-1] :] if joined else manifest.lineage


def default_text(subject: Subject) -> str:
    """The text to measure on when none is named: the built-in model's own language for it and its descendants."""
    origin = dense_reference(subject) or subject.reference
    return "builtin:tiny-evaluation" if origin.startswith("builtin:") else "builtin:python-docs"


def _name(reference: str, adapter: Path | None) -> str:
    name = Path(reference).expanduser().resolve().name if Path(reference).expanduser().is_dir() else reference
    return f"{name} + {adapter.name}" if adapter else name


def _full_name(reference: str, adapter: Path | None) -> str:
    return f"{reference} + {adapter}" if adapter else reference


def unique_labels(names: Sequence[str], full: Sequence[str]) -> list[str]:
    """Names that occur twice become full ones, and what still occurs twice is numbered."""
    counts = Counter(names)
    labels = [name if counts[name] == 1 else long for name, long in zip(names, full, strict=True)]
    repeated = Counter(labels)
    seen: Counter[str] = Counter()
    for position, label in enumerate(labels):
        seen[label] += 1
        if repeated[label] > 1 and seen[label] > 1:
            labels[position] = f"{label} ({seen[label]})"
    return labels
