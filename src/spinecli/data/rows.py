"""Rows of tokens: a text cut into equal lengths, the form in which models see it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spinecli.artifacts.manifest import FileRecord, Source
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.data.config import SpecialTokens
from spinecli.data.text import Text
from spinecli.errors import CalibrationTextError, OptionError, TokenizerError

_SAMPLE = "The river"


@dataclass(frozen=True)
class Frame:
    """Special tokens around the text of a row. They count into its length, and nothing predicts those in front."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    """What the tokenizer calls them, opening first."""

    @property
    def opening_text(self) -> str:
        """The opening as it may stand in a text."""
        return "".join(self.names[: len(self.opening)])

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.opening) + len(self.closing)

    def __str__(self) -> str:
        names = "".join(self.names)
        if not names:
            return "no special tokens"
        return f"each between {self.names[0]} and {self.names[-1]}" if self.closing else f"each opened by {names}"


NO_FRAME = Frame()


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of tokens, each in the same frame of special tokens, and where each of them comes from."""

    tokens: Tensor
    """(rows, length) int64."""
    kinds: tuple[str, ...]
    """What a person calls the texts that the rows come from: `wiki.txt`, `self`."""
    kind_of: Tensor
    """(rows,) int64: the number of each row's kind."""
    frame: Frame = NO_FRAME
    scored: Tensor | None = None
    """(rows, length) bool: tokens to be predicted; None: all but those that open a row."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.tokens.shape[1]

    @property
    def rows_by_kind(self) -> dict[str, int]:
        """Kind -> its number of rows."""
        return {kind: int((self.kind_of == number).sum()) for number, kind in enumerate(self.kinds)}

    def first(self, rows: int, length: int) -> TokenRows:
        """The first rows, shortened to `length` tokens; both at most what there is. Frames stay whole."""
        closing = len(self.frame.closing)
        tokens = self.tokens[:rows]
        tokens = torch.cat([tokens[:, : length - closing], tokens[:, self.length - closing :]], dim=1)
        return TokenRows(tokens.contiguous(), self.kinds, self.kind_of[:rows].clone(), self.frame)

    @property
    def targets(self) -> Tensor:
        """(rows, length) bool: tokens to be predicted, from those before them in their row."""
        given = max(1, len(self.frame.opening))
        wanted = torch.ones_like(self.tokens, dtype=torch.bool) if self.scored is None else self.scored.clone()
        wanted[:, :given] = False
        return wanted


def tokens_source(reference: str, tokens: Tensor) -> Source:
    """Tokens as an input of a step: the sum of their ids, which also covers how the text was tokenised."""
    return Source(reference=reference, files={"token ids": record_of(tokens)})


def record_of(values: Tensor) -> FileRecord:
    """Size and sum of a tensor, as if it were a file."""
    content = values.contiguous().numpy().tobytes()
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def token_rows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    rows: int,
    length: int,
    *,
    frame: Frame = NO_FRAME,
    vocabulary: int | None = None,
) -> TokenRows:
    """The first rows of a text, all of one kind.

    Args:
        frame: tokens that every row begins and ends with; they count into its length.
        vocabulary: size of the model's embedding, to refuse a tokenizer of another model.

    Raises: CalibrationTextError if the text is too short for one row, OptionError, TokenizerError.
    """
    if rows < 1 or length < 2:
        raise OptionError(f"Rows must be at least 1 and their length at least 2 tokens, not {rows} and {length}.")
    inner = length - frame.size
    if inner < 1:
        raise OptionError(f"Rows of {length} tokens have no room between the model's special tokens; make them longer.")
    tokens = first_tokens(tokenizer, text, rows * inner, frame, vocabulary)
    available = len(tokens) // inner
    if available == 0:
        raise CalibrationTextError(
            f"{text.reference} has {len(tokens)} tokens, fewer than one row of {inner}; "
            "name a longer text or shorter rows."
        )
    count = min(rows, available)
    body = tokens[: count * inner].view(count, inner)
    opening, closing = (body.new_tensor(ends).expand(count, -1) for ends in (frame.opening, frame.closing))
    rows_of = torch.cat([opening, body, closing], dim=1)
    return TokenRows(rows_of, (text.reference,), torch.zeros(count, dtype=torch.int64), frame)


def first_tokens(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    wanted: int,
    frame: Frame = NO_FRAME,
    vocabulary: int | None = None,
) -> Tensor:
    """The first tokens of a text without special ones around it: (wanted or fewer,) int64.

    A prefix is tokenised, and a longer one until it yields enough; its last tokens are dropped because the cut through
    the text may have changed them.

    Args:
        frame: a text that carries its own beginning loses it, because the row brings it.
        vocabulary: size of the model's embedding, to refuse a tokenizer of another model.

    Raises: TokenizerError, and what rendering conversations raises.
    """
    ids = prefix_ids(tokenizer, text.content_for(tokenizer, frame.opening_text), wanted)
    require_vocabulary(ids, vocabulary)
    return torch.tensor(ids, dtype=torch.int64)


def prefix_ids(tokenizer: PreTrainedTokenizerBase, content: str, wanted: int) -> list[int]:
    """The first tokens of a text, `wanted` of them or all that it has."""
    length = wanted * 6
    while True:
        ids: list[int] = tokenizer(content[:length], add_special_tokens=False, verbose=False)["input_ids"]
        # a cut through the text may have changed its last tokens
        if length >= len(content) or len(ids) >= wanted + 8:
            return ids[:wanted]
        length *= 2


def require_vocabulary(ids: Sequence[int], vocabulary: int | None) -> None:
    """Refuse token ids that an embedding of this size does not have.

    Raises: TokenizerError.
    """
    highest = max(ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise TokenizerError(
            f"The tokenizer produces token {highest}, but the model's vocabulary ends at {vocabulary - 1}; the "
            "tokenizer belongs to another model."
        )


def frame_of(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens = SpecialTokens.auto
) -> Frame:
    """The special tokens of a row: what the tokenizer puts around a text of itself.

    What a decoder's tokenizer puts behind a text, its end, stays away: a row ends where it is full, not where the text
    does.
    """
    if special_tokens is SpecialTokens.none:
        return NO_FRAME
    opening, closing = _around(tokenizer)
    if checkpoint.family.kind != "encoder":
        closing = []
    return Frame(tuple(opening), tuple(closing), tuple(tokenizer.convert_ids_to_tokens([*opening, *closing])))


def opening_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts in front of a text of itself."""
    return tuple(_around(tokenizer)[0])


def without_opening(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Texts that the tokenizer is about to open, without the opening that some of them carry already."""
    opening = "".join(tokenizer.convert_ids_to_tokens(list(opening_of(tokenizer))))
    return [text.removeprefix(opening) for text in texts]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it."""
    plain: list[int] = tokenizer(_SAMPLE, add_special_tokens=False, verbose=False)["input_ids"]
    whole: list[int] = tokenizer(_SAMPLE, verbose=False)["input_ids"]
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
    if start is None:  # the text's own tokens depend on what stands in front of them
        special = set(tokenizer.all_special_ids)
        return list(takewhile(special.__contains__, whole)), []
    return whole[:start], whole[start + len(plain) :]
