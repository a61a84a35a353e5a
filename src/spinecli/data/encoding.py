"""Examples as token ids, in the form that their task trains on."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spinecli.checkpoints.tokenizer import padding_id
from spinecli.data.config import Task
from spinecli.data.examples import Dataset
from spinecli.data.instructions import encode_instructions
from spinecli.data.rows import opening_of, without_opening
from spinecli.errors import DataError, OptionError, TokenizerError

_Ids = Sequence[int]

# what a tokenizer gives for a row takes many times the room of its ids, so few rows are held in that form at a time
_CHUNK = 1000


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows of tokens. An example is one row, or several where a long text was cut into pieces."""

    task: Task
    tokens: tuple[Tensor, ...]
    """One (length,) int64 tensor a row, views of one storage."""
    labels: Tensor
    """(rows,) int64: the class of each row; empty for language modelling."""
    prompt_lengths: Tensor
    """(rows,) int64: leading tokens of each row that are not learned; empty for classification."""
    segments: tuple[Tensor, ...] | None
    """Like `tokens`: 0 for the first text of a pair and 1 for the second, if the model wants to be told."""
    offsets: tuple[int, ...]
    """Example i is the rows offsets[i] to offsets[i + 1]."""
    pad_id: int
    """Fills rows of a batch to equal length. A model that reads the class off its last token needs it as
    `config.pad_token_id`."""
    shortened: int
    """Examples that lost tokens because they were too long."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64: tokens of each row."""
        return torch.tensor([len(row) for row in self.tokens])

    def label_counts(self, examples: Sequence[int]) -> tuple[int, ...]:
        """How many of these examples have each label; empty for language modelling."""
        if not len(self.labels):
            return ()
        counts = torch.bincount(self.labels[list(examples)], minlength=int(self.labels.max()) + 1)
        return tuple(counts.tolist())

    def rows_of(self, examples: Sequence[int]) -> list[int]:
        """The rows that these examples became."""
        return [row for example in examples for row in range(self.offsets[example], self.offsets[example + 1])]


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, vocabulary: int | None = None
) -> Encoded:
    """The tokens of every example, none longer than `max_length`.

    Classification: text and pair with the special tokens that the tokenizer adds, cut at the end if too long. A row
    never ends in the padding token, whatever the text says: causal classifiers take the last token that is not
    padding for the end of the text.

    Language: a text with an end token behind it, if the tokenizer has one. A long text becomes several rows. Each of
    them begins with what the tokenizer puts in front of a text, which is no target; where it puts nothing there, with
    the last token of the row before. So every token that something stands before is a target exactly once.
    Instructions become a prompt that is not learned and the answer; see `encode_instructions`.

    Args:
        vocabulary: size of the model's embedding, to refuse a tokenizer of another model.

    Raises: OptionError if `max_length` leaves no room, TokenizerError, DataError if an example has no tokens.
    """
    if max_length < 2:
        raise OptionError(f"--max-length must be at least 2 tokens, not {max_length}.")
    starts = range(0, max(len(dataset), 1), _CHUNK)
    encoded = _joined(_encode_chunk(dataset, start, tokenizer, max_length) for start in starts)
    highest = max((int(row.max()) for row in encoded.tokens), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise TokenizerError(
            f"The tokenizer produces token {highest}, but the model's vocabulary ends at {vocabulary - 1}; "
            "the tokenizer belongs to another model."
        )
    return encoded


def _encode_chunk(whole: Dataset, start: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """The tokens of the `_CHUNK` examples from `start` on."""
    dataset = whole.subset(range(start, min(start + _CHUNK, len(whole))))
    if dataset.task == "classification":
        return _encode_classes(dataset, start, tokenizer, max_length)
    if dataset.examples and dataset.examples[0].answer is not None:
        return _encode_answers(dataset, start, tokenizer, max_length)
    return _encode_texts(dataset, start, tokenizer, max_length)


class _Rows:
    """Rows of ids that grow at the end of one storage, which is never held twice."""

    def __init__(self) -> None:
        self._flat = array("q")
        self._lengths: list[int] = []

    def add(self, rows: Sequence[Tensor]) -> None:
        if rows:
            self._flat.frombytes(torch.cat(list(rows)).numpy().tobytes())
            self._lengths += [len(row) for row in rows]

    def tensors(self) -> tuple[Tensor, ...]:
        if not self._flat:
            return torch.split(torch.empty(0, dtype=torch.int64), self._lengths) if self._lengths else ()
        return torch.split(torch.frombuffer(self._flat, dtype=torch.int64), self._lengths)


def _joined(chunks: Iterable[Encoded]) -> Encoded:
    """Encoded examples one behind the other, their rows as views of one storage."""
    tokens, segments = _Rows(), _Rows()
    labels, prompt_lengths, offsets, shortened = [], [], [0], 0
    for chunk in chunks:
        tokens.add(chunk.tokens)
        segments.add(chunk.segments or ())
        labels.append(chunk.labels)
        prompt_lengths.append(chunk.prompt_lengths)
        offsets += [offsets[-1] + end for end in chunk.offsets[1:]]
        shortened += chunk.shortened
    return replace(
        chunk,
        tokens=tokens.tensors(),
        labels=torch.cat(labels),
        prompt_lengths=torch.cat(prompt_lengths),
        segments=None if chunk.segments is None else segments.tensors(),
        offsets=tuple(offsets),
        shortened=shortened,
    )


def _encode_classes(dataset: Dataset, start: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    first = without_opening(tokenizer, [example.text for example in dataset.examples])
    second = [example.pair for example in dataset.examples if example.pair is not None]
    paired = len(second) > 0
    added = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length <= added + paired:
        raise OptionError(f"--max-length {max_length} leaves no room for text beside {added} special tokens; raise it.")
    # without pairs every segment is 0, which is what models assume when they are told nothing
    segmented = paired and "token_type_ids" in tokenizer.model_input_names
    settings = {"return_attention_mask": False, "return_token_type_ids": segmented, "verbose": False}
    found = tokenizer(first, second or None, **settings)
    rows: list[list[int]] = found["input_ids"]
    segments: list[list[int]] = found["token_type_ids"] if segmented else []
    long = [index for index, row in enumerate(rows) if len(row) > max_length]
    if long:
        texts = [first[index] for index in long], [second[index] for index in long] if paired else None
        cut = tokenizer(*texts, truncation=True, max_length=max_length, **settings)
        for place, index in enumerate(long):
            rows[index] = cut["input_ids"][place]
            if segmented:
                segments[index] = cut["token_type_ids"][place]
    pad_id = padding_id(tokenizer)
    for row in rows:
        while row and row[-1] == pad_id:
            row.pop()
    _refuse_short(dataset, start, rows, 1)
    lengths = [len(row) for row in rows]
    return Encoded(
        task=dataset.task,
        tokens=_tensors(rows),
        labels=torch.tensor([example.label for example in dataset.examples], dtype=torch.int64),
        prompt_lengths=torch.empty(0, dtype=torch.int64),
        segments=_tensors([row[:length] for row, length in zip(segments, lengths, strict=True)]) if segmented else None,
        offsets=tuple(range(len(rows) + 1)),
        pad_id=pad_id,
        shortened=len(long),
    )


def _encode_texts(dataset: Dataset, start: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    texts = without_opening(tokenizer, [example.text for example in dataset.examples])
    opening = list(opening_of(tokenizer))
    found: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    for row in found:
        if end is not None and row and row[-1] != end:
            row.append(end)
    _refuse_short(dataset, start, found, 2)
    if max_length <= len(opening):
        raise OptionError(f"--max-length {max_length} leaves no room beside {len(opening)} special tokens; raise it.")
    pieces = [_pieces(row, opening, max_length) for row in found]
    rows = list(chain.from_iterable(pieces))
    given = len(opening) if len(opening) > 1 else 0  # nothing predicts the first token of a row anyway
    return _language(dataset, tokenizer, rows, [given] * len(rows), [len(piece) for piece in pieces], shortened=0)


def _pieces(row: list[int], opening: list[int], max_length: int) -> list[list[int]]:
    """A text's tokens as rows of at most `max_length`."""
    if not opening or row[: len(opening)] != opening:
        return [row[at : at + max_length] for at in range(0, len(row) - 1, max_length - 1)]
    text, room = row[len(opening) :], max_length - len(opening)
    return [opening + text[at : at + room] for at in range(0, len(text), room)]


def _encode_answers(dataset: Dataset, start: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    found = encode_instructions(dataset, tokenizer, max_length, start)
    _refuse_short(dataset, start, found.rows, 2)
    return _language(dataset, tokenizer, found.rows, found.prompt_lengths, [1] * len(found.rows), found.shortened)


def _language(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[_Ids],
    prompt_lengths: Sequence[int],
    rows_per_example: Sequence[int],
    shortened: int,
) -> Encoded:
    return Encoded(
        task=dataset.task,
        tokens=_tensors(rows),
        labels=torch.empty(0, dtype=torch.int64),
        prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.int64),
        segments=None,
        offsets=tuple(accumulate(rows_per_example, initial=0)),
        pad_id=padding_id(tokenizer),
        shortened=shortened,
    )


def _refuse_short(dataset: Dataset, start: int, rows: Sequence[_Ids], least: int) -> None:
    for index, row in enumerate(rows):
        if len(row) < least:
            raise DataError(
                f"Example {start + index + 1} of {dataset.reference} ({dataset.examples[index].text!r:.40}) has "
                f"{len(row)} tokens and {dataset.task} needs {least}; lengthen or remove it."
            )


def _tensors(rows: Sequence[_Ids]) -> tuple[Tensor, ...]:
    """One (length,) tensor a row, cut from a single one, which is much faster than making each."""
    flat = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
    return torch.split(flat, [len(row) for row in rows])
