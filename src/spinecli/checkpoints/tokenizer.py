"""The tokenizer beside a checkpoint, and whether it belongs to the model."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import MissingPackageError, TokenizerError, reason_of

_log = logging.getLogger(__name__)
# Special tokens that a model is given or gives; others are only reserved.
_IN_USE = ("pad_token", "bos_token", "eos_token", "cls_token", "sep_token", "mask_token")
# An embedding is padded to a multiple of some power of two, but not by more than this.
_SUSPICIOUS_SHARE = 0.8
# Files that only these packages read.
_PACKAGES = {"*.model": "sentencepiece", "*.tiktoken": "tiktoken"}
_FILES = ("tokenizer*", "vocab.*", "tekken.json", *_PACKAGES)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory; TokenizerError if it has none that can be read.

    `tokenizer_of` also checks that it fits the checkpoint.
    """
    empty = [path.name for path in sorted(directory.glob("tokenizer*")) if path.is_file() and not path.stat().st_size]
    if empty:
        raise TokenizerError(f"{directory / empty[0]} is empty; fetch the tokenizer again.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    # the tokenizers library raises bare Exception on malformed files
    except Exception as error:
        alone = not (directory / "tokenizer.json").is_file()
        needed = [name for pattern, name in _PACKAGES.items() if alone and any(directory.glob(pattern))]
        missing = [name for name in needed if not find_spec(name)]
        if missing:
            way_out = f"install it with: pip install {missing[0]}"
            raise MissingPackageError(
                f"The tokenizer in {directory} needs the package {missing[0]}; {way_out}"
            ) from error
        if not has_tokenizer(directory):
            raise TokenizerError(f"{directory} has no tokenizer; fetch its files, such as tokenizer.json.") from error
        reason = reason_of(error)
        raise TokenizerError(
            f"The tokenizer in {directory} cannot be read ({reason:.200}); fetch its files again."
        ) from error
    return tokenizer


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; see `fitting_tokenizer`."""
    return fitting_tokenizer(checkpoint.path, int(checkpoint.config.vocab_size))


def fitting_tokenizer(directory: Path, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, whose tokens all have one of an embedding's `rows`, but for some that were added.

    Raises: TokenizerError if there is none, or one that belongs to another model.
    """
    tokenizer = load_tokenizer(directory)
    file = directory / "tokenizer_config.json"
    for name in _IN_USE:
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= rows:
            raise TokenizerError(
                f"{file} has the {name} {getattr(tokenizer, name)!r}, number {token}, but the model's vocabulary ends "
                f"at {rows - 1}; name a token there that the model has."
            )
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"The tokenizer in {directory} has {tokenizer.vocab_size} tokens, but the model's vocabulary ends at "
            f"{rows - 1}; the tokenizer belongs to another model."
        )
    if beyond := sorted(token for token, number in tokenizer.get_added_vocab().items() if number >= rows):
        _log.warning(
            f"The tokenizer in {directory} knows {', '.join(beyond[:4])}{', ...' if len(beyond) > 4 else ''}, "
            "for which the embedding has no row; texts with it are refused."
        )
    if len(tokenizer) < _SUSPICIOUS_SHARE * rows:
        _log.warning(
            f"The tokenizer in {directory} has {len(tokenizer)} tokens and the embedding {rows} rows; does it "
            "belong to this model?"
        )
    return tokenizer


def require_fitting_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise TokenizerError if a checkpoint has a tokenizer and it does not fit; a checkpoint may also have none."""
    if has_tokenizer(checkpoint.path):
        tokenizer_of(checkpoint)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has files of a tokenizer."""
    return any(path for pattern in _FILES for path in directory.glob(pattern))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, else its end or beginning of text, else 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return next((int(token) for token in known if token is not None), 0)
