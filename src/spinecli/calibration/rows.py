"""Rows of tokens: a text cut into equal lengths, the form in which models see it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spinecli.artifacts.manifest import FileRecord, Source
from spinecli.calibration.text import Text, default_text, load_text
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import CalibrationTextError, OptionError, TokenizerError


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The first `rows` * `length` tokens of a text, without special tokens."""

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
    tokenizer: PreTrainedTokenizerBase, text: Text, rows: int, length: int, *, vocabulary: int | None = None
) -> TokenRows:
    """The first rows of a text.

    Args:
        vocabulary: size of the model's embedding, to refuse a tokenizer of another model.

    Raises: CalibrationTextError if the text is too short for one row, OptionError, TokenizerError.
    """
    if rows < 1 or length < 2:
        raise OptionError(f"Rows must be at least 1 and their length at least 2 tokens, not {rows} and {length}.")
    tokens = _first_tokens(tokenizer, text.content, rows * length)
    available = len(tokens) // length
    if available == 0:
        raise CalibrationTextError(
            f"{text.reference} has {len(tokens)} tokens, fewer than one row of {length}; "
            "name a longer text or shorter rows."
        )
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise TokenizerError(
            f"The tokenizer makes token {int(tokens.max())}, but the model's vocabulary ends at {vocabulary - 1}; "
            "the tokenizer belongs to another model."
        )
    count = min(rows, available)
    return TokenRows(tokens[: count * length].view(count, length), text)


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
    limit = getattr(checkpoint.config, "max_position_embeddings", None)
    if limit is not None and options.length > limit:
        raise OptionError(f"--calibration-length {options.length} exceeds the model's {limit} positions; lower it.")
    text = load_text(options.text) if options.text else default_text(builtin_model=reference.startswith("builtin:"))
    tokenizer = load_tokenizer(checkpoint.path)
    return token_rows(tokenizer, text, options.rows, options.length, vocabulary=int(checkpoint.config.vocab_size))
