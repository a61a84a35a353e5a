"""One device's share of an encoded data set, by itself and as a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from spinecli.artifacts.record import Record
from spinecli.data.config import Task
from spinecli.data.encoding import Encoded
from spinecli.federation.messages import Message, checked_header


class _PartHeader(Record):
    task: str = Field(pattern="^(classification|language)$")
    pad_id: int
    shortened: int


def part_of(encoded: Encoded, examples: Sequence[int]) -> Encoded:
    """These examples, in this order, as a set of their own; batches drawn from it are those drawn from the whole."""
    rows = encoded.rows_of(examples)
    counts = [encoded.offsets[example + 1] - encoded.offsets[example] for example in examples]
    chosen = torch.tensor(rows, dtype=torch.int64)
    return Encoded(
        task=encoded.task,
        tokens=tuple(encoded.tokens[row] for row in rows),
        labels=encoded.labels[chosen] if len(encoded.labels) else encoded.labels,
        prompt_lengths=encoded.prompt_lengths[chosen] if len(encoded.prompt_lengths) else encoded.prompt_lengths,
        segments=None if encoded.segments is None else tuple(encoded.segments[row] for row in rows),
        offsets=tuple(accumulate(counts, initial=0)),
        pad_id=encoded.pad_id,
        shortened=encoded.shortened,
    )


def save_part(encoded: Encoded, path: Path) -> None:
    """Write a set of examples to a file."""
    tensors = {
        "tokens": torch.cat(encoded.tokens),
        "lengths": encoded.lengths,
        "labels": encoded.labels,
        "prompt_lengths": encoded.prompt_lengths,
        "offsets": torch.tensor(encoded.offsets),
    }
    if encoded.segments is not None:
        tensors["segments"] = torch.cat(encoded.segments)
    header = _PartHeader(task=encoded.task, pad_id=encoded.pad_id, shortened=encoded.shortened)
    path.write_bytes(Message(header.model_dump(), tensors).pack())


def load_part(path: Path) -> Encoded:
    """The set of examples that `save_part` wrote. Raises MessageError if the file is damaged."""
    message = Message.unpack(path.read_bytes())
    header = checked_header(_PartHeader, message, f"{path} is")
    tensors = message.tensors
    lengths = tensors["lengths"].tolist()

    def rows(flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, lengths)

    return Encoded(
        task=cast("Task", header.task),
        tokens=rows(tensors["tokens"]),
        labels=tensors["labels"],
        prompt_lengths=tensors["prompt_lengths"],
        segments=rows(tensors["segments"]) if "segments" in tensors else None,
        offsets=tuple(tensors["offsets"].tolist()),
        pad_id=header.pad_id,
        shortened=header.shortened,
    )
