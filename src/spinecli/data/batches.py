"""Batches of rows: endless shuffled ones to train on, and ordered ones to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spinecli.data.encoding import Encoded
from spinecli.errors import DataError, OptionError

IGNORED = -100
"""The target that the loss of PyTorch and transformers leaves out."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to the longest of them."""

    input_ids: Tensor
    """(rows, length) int64."""
    attention_mask: Tensor
    """(rows, length) int64: 1 for tokens, 0 for padding."""
    labels: Tensor
    """Classes (rows,) for classification. For language modelling (rows, length): each token at its own place, where
    transformers expects it and shifts by one, and IGNORED for prompts and padding."""
    row_numbers: Tensor
    """(rows,) int64: which rows of the encoded set these are."""
    token_type_ids: Tensor | None = None
    """(rows, length) int64 for models that tell the texts of a pair apart, else None."""

    def model_inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes, without the labels."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.token_type_ids is None else {**inputs, "token_type_ids": self.token_type_ids}

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device; `row_numbers` stay where they are."""
        segments = None if self.token_type_ids is None else self.token_type_ids.to(device)
        moved = (self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))
        return Batch(*moved, self.row_numbers, segments)


def collate(encoded: Encoded, rows: Sequence[int]) -> Batch:
    """These rows of the encoded set as a batch, in this order."""
    numbers = torch.tensor(rows, dtype=torch.int64)
    tokens = [encoded.tokens[row] for row in rows]
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=encoded.pad_id)
    places = torch.arange(input_ids.shape[1])
    # from the lengths and not from the ids, which may hold the padding token inside a text
    present = places < torch.tensor([len(row) for row in tokens])[:, None]
    if encoded.task == "classification":
        labels = encoded.labels[numbers]
    else:
        learned = present & (places >= encoded.prompt_lengths[numbers][:, None])
        labels = input_ids.masked_fill(~learned, IGNORED)
    segments = None
    if encoded.segments is not None:
        segments = pad_sequence([encoded.segments[row] for row in rows], batch_first=True)
    return Batch(input_ids, present.to(torch.int64), labels, numbers, segments)


def batches(
    encoded: Encoded, examples: Sequence[int], batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Exactly `steps` batches from endless passes over a device's examples, each pass in a new random order.

    A batch that a pass leaves unfinished is filled from the next pass. So every batch has `batch_size` rows, or all
    rows if there are fewer.

    Args:
        examples: indices of the device's examples, as `partition` gives them.
        generator: drawn from once a pass, when the pass begins.

    Raises: DataError if there are no examples, OptionError.
    """
    if batch_size < 1 or steps < 0:
        raise OptionError(
            f"Batches must have at least 1 row and steps must be at least 0, not {batch_size} and {steps}."
        )
    rows = torch.tensor(encoded.rows_of(examples), dtype=torch.int64)
    if not len(rows):
        raise DataError("A device without examples cannot train; give every device at least one.")
    return _endless(encoded, rows, min(batch_size, len(rows)), steps, generator)


def _endless(encoded: Encoded, rows: Tensor, size: int, steps: int, generator: torch.Generator) -> Iterator[Batch]:
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < size:
            waiting += rows[torch.randperm(len(rows), generator=generator)].tolist()
        yield collate(encoded, waiting[:size])
        del waiting[:size]


def evaluation_batches(encoded: Encoded, batch_size: int) -> Iterator[Batch]:
    """Every row once, longest first, so that little is padded and memory peaks at the start.

    `result[batch.row_numbers] = ...` puts what was computed back into the order of the encoded set.

    Raises: OptionError.
    """
    if batch_size < 1:
        raise OptionError(f"Batches must have at least 1 row, not {batch_size}.")
    order = torch.argsort(encoded.lengths, descending=True, stable=True)
    return (collate(encoded, rows.tolist()) for rows in torch.split(order, batch_size))
