"""Rows of tokens: a text cut into equal lengths, the form in which models see it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spinecli.artifacts.manifest import FileRecord, Source
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.data.text import Text, default_text, load_text
from spinecli.errors import CalibrationTextError, OptionError, TokenizerError


@dataclass(frozen=True)
class Frame:
    """Tokens around a row."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


NO_FRAME = Frame()


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The first tokens of a text, `length` a row; an encoder's rows begin and end with its special tokens."""

    tokens: Tensor
    """(rows, length) int64."""
    text: Text

    def source(self) -> Source:
        """These tokens as an input of a step: the sum of their ids, which also covers how the text was tokenised."""
        content = self.tokens.numpy().tobytes()
        record = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        return Source(reference=self.text.reference, files={"token ids": record})

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.tokens.shape[1]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory; TokenizerError if it has none that can be read."""
    empty = [path.name for path in sorted(directory.glob("tokenizer*")) if path.is_file() and not path.stat().st_size]
    if empty:
        raise TokenizerError(f"{directory / empty[0]} is empty; fetch the tokenizer again.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    # the tokenizers library raises bare Exception on malformed files
    except Exception as error:
        raise TokenizerError(f"The tokenizer in {directory} cannot be read; fetch its files again.") from error
    return tokenizer


def token_rows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    rows: int,
    length: int,
    *,
    frame: Frame = NO_FRAME,
    vocabulary: int | None = None,
) -> TokenRows:
    """The first rows of a text.

    Args:
        frame: tokens that every row begins and ends with; they count into its length.
        vocabulary: size of the model's embedding, to refuse a tokenizer of another model.

    Raises: CalibrationTextError if the text is too short for one row, OptionError, TokenizerError.
    """
    if rows < 1 or length < 2:
        raise OptionError(f"Rows must be at least 1 and their length at least 2 tokens, not {rows} and {length}.")
    inner = length - len(frame.opening) - len(frame.closing)
    if inner < 1:
        raise OptionError(f"Rows of {length} tokens have no room between the model's special tokens; make them longer.")
    tokens = _first_tokens(tokenizer, text.content, rows * inner)
    available = len(tokens) // inner
    if available == 0:
        raise CalibrationTextError(
            f"{text.reference} has {len(tokens)} tokens, fewer than one row of {inner}; "
            "name a longer text or shorter rows."
        )
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise TokenizerError(
            f"The tokenizer makes token {int(tokens.max())}, but the model's vocabulary ends at {vocabulary - 1}; "
            "the tokenizer belongs to another model."
        )
    count = min(rows, available)
    body = tokens[: count * inner].view(count, inner)
    opening, closing = (body.new_tensor(ends).expand(count, -1) for ends in (frame.opening, frame.closing))
    return TokenRows(torch.cat([opening, body, closing], dim=1), text)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, content: str, wanted: int) -> Tensor:
    """At least `wanted` tokens of `content` if it has them, without tokenising much more than that.

    A prefix is tokenised, and a longer one until it yields enough; its last tokens are dropped because the cut through
    the text may have changed them.
    """
    length = wanted * 6
    while True:
        ids = tokenizer(content[:length], add_special_tokens=False, verbose=False)["input_ids"]
        whole = length >= len(content)
        usable = ids if whole else ids[:-8]
        if whole or len(usable) >= wanted:
            return torch.tensor(usable[:wanted], dtype=torch.int64)
        length *= 2


def frame_of(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The special tokens that an encoder reads every text between, where its tokenizer has them; else none."""
    opening, closing = tokenizer.cls_token_id, tokenizer.sep_token_id
    if checkpoint.family.kind != "encoder" or opening is None or closing is None:
        return NO_FRAME
    return Frame((opening,), (closing,))


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text, and how much of it."""

    text: str | None = None
    """A reference for `load_text`; None takes `default_text`."""
    rows: int = 128
    length: int = 128


def calibration_rows(checkpoint: Checkpoint, reference: str, options: CalibrationOptions) -> TokenRows:
    """The calibration tokens of a run.

    Args:
        reference: the model as the user named it; the built-in one calibrates on its own language by default.

    Raises: CalibrationTextError, TokenizerError, OptionError.
    """
    limit = checkpoint.positions
    if limit is not None and options.length > limit:
        raise OptionError(f"--calibration-length {options.length} exceeds the model's {limit} positions; lower it.")
    text = load_text(options.text) if options.text else default_text(builtin_model=reference.startswith("builtin:"))
    tokenizer = load_tokenizer(checkpoint.path)
    frame, vocabulary = frame_of(checkpoint, tokenizer), int(checkpoint.config.vocab_size)
    return token_rows(tokenizer, text, options.rows, options.length, frame=frame, vocabulary=vocabulary)
