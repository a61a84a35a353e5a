"""What server and device say to each other in a split round, and how the server checks what it is told.

begin   ▶ bottom, learning rate, batch size        ◀ features and labels of the first batch
step    ▶ gradients of the features it has sent    ◀ features and labels of the next batch
finish  ▶ gradients of the features it has sent    ◀ its bottom
local   ▶ the whole model                          ◀ the whole model (the unsplit reference)

A device whose own numbers have left the finite range answers any of these with what of it has diverged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spinecli.artifacts.record import FiniteRecord
from spinecli.data.batches import IGNORED
from spinecli.data.config import Task
from spinecli.errors import MessageError
from spinecli.federation.bounds import Examples, Loss
from spinecli.federation.config import FeatureDtype, Optimizer
from spinecli.federation.messages import Message, checked_header, require_moderate, require_shapes

_LARGEST = 127
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_SCALE_BYTES = 4


def bytes_per_token(d_model: int, dtype: FeatureDtype) -> int:
    """Bytes that the features of one token take in a message."""
    return d_model * _TYPES[dtype].itemsize + (_SCALE_BYTES if dtype == "int8" else 0)


def packed(values: Tensor, dtype: FeatureDtype) -> dict[str, Tensor]:
    """Tensors of a message that carry `values` (tokens, d_model).

    int8 keeps one scale a token, its largest absolute value over 127, and rounds to the nearest: the error of a number
    is at most half of that scale.
    """
    if dtype != "int8":
        return {"values": values.to(_TYPES[dtype])}
    scales = values.abs().amax(dim=1).float() / _LARGEST
    steps = torch.where(scales > 0, scales, 1.0)[:, None]
    return {"values": (values.float() / steps).round().to(torch.int8), "scales": scales}


def unpacked(tensors: Mapping[str, Tensor], tokens: int, d_model: int, dtype: FeatureDtype) -> Tensor:
    """What `packed` carries, (tokens, d_model) float32. Raises MessageError if it is not of this size or type."""
    values = tensors.get("values")
    if values is None or values.dtype is not _TYPES[dtype] or tuple(values.shape) != (tokens, d_model):
        found = "none" if values is None else f"{list(values.shape)} of {values.dtype}"
        raise MessageError(f"Its features are {found}, not {[tokens, d_model]} of {dtype}.")
    whole = values.float()
    if dtype == "int8":
        scales = tensors.get("scales")
        if scales is None or scales.dtype is not torch.float32 or tuple(scales.shape) != (tokens,):
            raise MessageError("Its features come without one scale a token.")
        whole = whole * scales[:, None]
    if not bool(torch.isfinite(whole).all()):
        raise MessageError("Its features hold NaN or infinite values.")
    return whole


def padded(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of equal length: values (tokens, ...) -> (rows, longest, ...) and a mask (rows, longest) int64."""
    rows = pad_sequence(list(torch.split(values, lengths.tolist())), batch_first=True)
    mask = torch.arange(rows.shape[1]) < lengths[:, None]
    return rows, mask.to(torch.int64)


def unpadded(values: Tensor, mask: Tensor) -> Tensor:
    """The real tokens of padded rows: (rows, length, ...) -> (tokens, ...), row after row."""
    return values[mask.bool()]


BEGIN, STEP, FINISH, LOCAL, PROBE = "split-begin", "split-step", "split-finish", "split-local", "split-probe"

TRAINED = "trained."
GRADIENT = "gradient."
FEATURES = "features."
PAYLOAD = "payload"

_FIGURES = "Its figures are"


class BeginOrder(FiniteRecord):
    """How a device trains in this round."""

    round: int = Field(ge=0)
    seed: int = Field(ge=0)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    optimizer: Optimizer
    clip_norm: float = Field(gt=0)
    feature_dtype: FeatureDtype


class StepOrder(FiniteRecord):
    """What the gradients of a message belong to; a message without gradients drops the features."""

    round: int = Field(ge=0)
    iteration: int = Field(ge=0)
    """The iteration whose features the gradients are of."""


class ProbeOrder(FiniteRecord):
    """Compute so many rows, keep what comes out, and send as many bytes back as came."""

    rows: int = Field(ge=1, le=64)


class FeatureFigures(FiniteRecord):
    """What stands beside features."""

    iteration: int = Field(ge=0)


class LocalFigures(FiniteRecord):
    """What stands beside a locally trained model."""

    examples: Examples
    loss_before: Loss
    loss_after: Loss


Diverging = Literal["features", "loss", "gradient", "weights"]
"""What of a device's training may be no finite number any more."""


class DivergedFigures(FiniteRecord):
    """All that a device says whose training has diverged."""

    diverged: Diverging


def diverged_message(what: Diverging) -> Message:
    """The answer of a device whose training has diverged."""
    return Message({"diverged": what}, {})


def diverging_of(message: Message) -> Diverging | None:
    """What has diverged on the device, if it says so; MessageError if it says it wrongly."""
    if "diverged" not in message.header:
        return None
    return checked_header(DivergedFigures, message, _FIGURES).diverged


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """One device's features, checked."""

    hidden: Tensor
    """(rows, length, d_model) float32, zero where padded."""
    attention_mask: Tensor
    """(rows, length) int64."""
    labels: Tensor
    """(rows,) classes, or (rows, length) tokens with IGNORED where nothing is learned."""

    @property
    def rows(self) -> int:
        """Examples, or pieces of text."""
        return len(self.attention_mask)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.attention_mask.shape[1])

    @property
    def answers(self) -> int:
        """What the loss is a mean over: labels, or learned tokens."""
        targets = self.labels if self.labels.dim() == 1 else self.labels[:, 1:]
        return int((targets != IGNORED).sum())


@dataclass(frozen=True)
class Expected:
    """What a batch of features must be like."""

    task: Task
    d_model: int
    choices: int
    """Labels, or tokens of the vocabulary."""
    longest: int
    """Tokens of a row at most."""
    feature_dtype: FeatureDtype


def checked_features(message: Message, rows: int, iteration: int, expected: Expected) -> FeatureBatch:
    """Validate a device's features; MessageError with what is wrong."""
    figures = checked_header(FeatureFigures, message, _FIGURES)
    if figures.iteration != iteration:
        raise MessageError(f"It answers iteration {figures.iteration}, not {iteration}.")
    tensors = message.tensors
    lengths = tensors.get("lengths")
    if lengths is None or lengths.dtype is not torch.int32 or tuple(lengths.shape) != (rows,):
        raise MessageError(f"It does not say how long each of its {rows} rows is.")
    if int(lengths.min()) < 1 or int(lengths.max()) > expected.longest:
        raise MessageError(
            f"Its rows have {int(lengths.min())} to {int(lengths.max())} tokens, not 1 to {expected.longest}."
        )
    tokens = int(lengths.sum())
    labels = tensors.get("labels")
    count = rows if expected.task == "classification" else tokens
    if labels is None or labels.dtype is not torch.int32 or tuple(labels.shape) != (count,):
        raise MessageError(f"It does not send {count} labels.")
    lowest = 0 if expected.task == "classification" else IGNORED
    known = (labels >= 0) & (labels < expected.choices) | (labels == lowest)
    if not bool(known.all()):
        raise MessageError(f"Its label {int(labels[~known][0])} is not one of the {expected.choices} labels.")
    own = {name.removeprefix(FEATURES): value for name, value in tensors.items() if name.startswith(FEATURES)}
    if strangers := tensors.keys() - {"lengths", "labels", *(FEATURES + name for name in ("values", "scales"))}:
        raise MessageError(f"{sorted(strangers)[0]} was not asked for.")
    hidden, mask = padded(unpacked(own, tokens, expected.d_model, expected.feature_dtype), lengths)
    targets = labels.to(torch.int64)
    if expected.task == "language":
        targets, _ = padded(targets, lengths)
        targets = targets.masked_fill(mask == 0, IGNORED)
    batch = FeatureBatch(hidden, mask, targets)
    if not batch.answers:
        raise MessageError("Its labels leave nothing to learn.")
    return batch


def checked_parameters(message: Message, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Validate what a device has trained, and put it in the order of `shapes`; MessageError with what is wrong."""
    tensors = {name.removeprefix(TRAINED): value for name, value in message.tensors.items()}
    require_moderate(tensors)
    require_shapes(tensors, shapes)
    return {name: tensors[name] for name in shapes}


def checked_local_figures(message: Message) -> LocalFigures:
    """Validate what stands beside a locally trained model; MessageError."""
    return checked_header(LocalFigures, message, _FIGURES)
