"""What a heal run is asked for, and everything that must be right before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import JsonValue

from spinecli.artifacts.manifest import (
    DENSE_KIND,
    MANIFEST_NAME,
    Manifest,
    Source,
    Step,
    lineage_behind,
    read_manifest,
)
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions, compute_options
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.data.calibration import Calibration, default_words, open_calibration
from spinecli.data.config import CalibrationConfig
from spinecli.data.sources import SELF, read_sources
from spinecli.errors import (
    CalibrationTextError,
    ForeignArtifactError,
    MissingPathError,
    OfflineError,
    OptionError,
)
from spinecli.healing.config import HealConfig, Loss
from spinecli.healing.processes import own_device

_LENGTH = 512
_EPOCHS_OF_OWN_TEXT = 4
# Of all rows, at most a tenth is held out, and no more tokens than are enough to judge by.
_HELD_OUT_SHARE = 10
_HELD_OUT_TOKENS = 16_384
_LEAST_ROWS = 8


@dataclass(frozen=True, eq=False)
class HealRequest:
    """A checked config with everything opened."""

    config: HealConfig
    compute: ComputeOptions
    student: Checkpoint
    teacher: Checkpoint | None
    """None if the text alone is learned from."""
    inputs: dict[str, Source]
    lineage: tuple[Step, ...]
    text: Calibration
    epochs: int

    @property
    def held_out(self) -> int:
        """How many of the last rows are never trained on."""
        rows, length = self.text.rows, self.text.length
        return max(2, min(rows // _HELD_OUT_SHARE, -(-_HELD_OUT_TOKENS // length)))

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        return {
            **self.config.parameters(),
            "text_length": self.text.length,
            "epochs": self.epochs,
            "learning_rate": self.config.training.peak_learning_rate,
        }


def open_request(config: HealConfig) -> HealRequest:
    """Find the dense teacher of a cut checkpoint, and check that everything fits together.

    Raises: OptionError, ForeignArtifactError, CalibrationTextError, MissingPathError, and what reading can raise.
    """
    student = Checkpoint.open(config.pruned)
    if student.task is not Task.causal_lm:
        raise OptionError(
            f"{config.pruned} is made for {student.task.value}; spine heal trains causal language models."
        )
    if (config.training.depth or 1) > student.blocks:
        raise OptionError(
            f"--depth {config.training.depth} is more than the {student.blocks} blocks that {config.pruned} has."
        )
    if config.dtype == "float16":
        raise OptionError("--dtype float16 is too narrow for gradients; use bfloat16 or float32.")
    source = describe_source(str(config.pruned), config.pruned)
    lineage = lineage_behind(config.pruned, source)
    manifest = read_manifest(config.pruned) if (config.pruned / MANIFEST_NAME).is_file() else None
    compute = compute_options(own_device(config.device), config.dtype)
    inputs = {"pruned": source}
    teacher = None
    if config.training.loss is not Loss.lm:
        teacher, inputs["dense"] = _teacher(config, lineage, manifest)
        _require_kin(teacher, student, inputs["dense"].reference, config)
    text, epochs = _text(config, teacher or student, inputs.get("dense", source), lineage, compute)
    if text.rows < _LEAST_ROWS:
        raise CalibrationTextError(
            f"The text gives {text.rows} rows of {text.length} tokens, and healing needs {_LEAST_ROWS} to train on and "
            "hold out; name a longer text, or shorten its rows with --text-length."
        )
    inputs["text"] = text.source()
    return HealRequest(config, compute, student, teacher, inputs, lineage, text, epochs)


def _teacher(config: HealConfig, lineage: tuple[Step, ...], manifest: Manifest | None) -> tuple[Checkpoint, Source]:
    """The dense checkpoint at the beginning of the lineage, where it was or where --dense says."""
    root = lineage[0] if manifest and lineage[0].kind == DENSE_KIND else None
    reference = config.dense or (root.reference if root else None)
    if reference is None:
        raise OptionError(
            f"{config.pruned} does not say which model it was cut from; name that with --dense, or learn from the text "
            "alone with --loss lm."
        )
    try:
        path = resolve_checkpoint(reference)
    except (MissingPathError, OfflineError) as error:
        if config.dense:
            raise
        raise MissingPathError(
            f"The dense checkpoint {reference} that {config.pruned} was made from does not exist; name it with --dense."
        ) from error
    source = describe_source(reference, path)
    if root and source.digest != root.digest:
        raise ForeignArtifactError(
            f"{reference} is not the checkpoint that {config.pruned} was made from; name that one with --dense."
        )
    return Checkpoint.open(path), source


def _require_kin(teacher: Checkpoint, student: Checkpoint, reference: str, config: HealConfig) -> None:
    """Refuse a teacher whose tokens mean something else, and a student that cannot be a cut of it.

    Raises: ForeignArtifactError.
    """
    if teacher.task is not Task.causal_lm:
        raise ForeignArtifactError(f"{reference} is made for {teacher.task.value} and predicts no next token.")
    sizes = [int(each.config.vocab_size) for each in (teacher, student)]
    if sizes[0] != sizes[1] or tokenizer_of(teacher).get_vocab() != tokenizer_of(student).get_vocab():
        raise ForeignArtifactError(
            f"{reference} has another vocabulary than {config.pruned}; name the model that it was cut from with "
            "--dense."
        )
    if teacher.d_model != student.d_model or student.blocks > teacher.blocks:
        raise ForeignArtifactError(
            f"{config.pruned} is no cut of {reference}: it has {student.blocks} blocks of width {student.d_model}, and "
            f"the other {teacher.blocks} of width {teacher.d_model}; name the model that it was cut from with --dense."
        )


def _text(
    config: HealConfig, author: Checkpoint, source: Source, lineage: tuple[Step, ...], compute: ComputeOptions
) -> tuple[Calibration, int]:
    """The rows to train on and hold out, and how often each is trained on."""
    asked = config.text
    words = asked.text or _calibrated_on(lineage) or default_words(author, source.reference)
    own = any(each.reference == SELF for each in read_sources(words, "--text"))
    epochs = asked.epochs or (_EPOCHS_OF_OWN_TEXT if own else 1)
    length = asked.length or min(_LENGTH, author.positions or _LENGTH)
    wanted = max(_LEAST_ROWS, math.ceil(asked.tokens / epochs / length))
    held_out = max(2, min(wanted // (_HELD_OUT_SHARE - 1), -(-_HELD_OUT_TOKENS // length)))
    options = CalibrationConfig(text=words, rows=wanted + held_out, length=length, special_tokens=asked.special_tokens)
    text = open_calibration(author, source, options, seed=config.seed, compute=compute, option="--text", packed=True)
    return text, epochs


def _calibrated_on(lineage: tuple[Step, ...]) -> tuple[str, ...] | None:
    """The texts that the newest cut was calibrated on, as its user named them; None if none were named."""
    for step in reversed(lineage):
        if step.command == "prune":
            calibration = step.config.get("calibration")
            words = calibration.get("text") if isinstance(calibration, dict) else None
            return tuple(str(word) for word in words) if isinstance(words, list) and words else None
    return None
