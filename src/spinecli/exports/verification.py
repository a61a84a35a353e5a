"""A written GGUF file, compared with the checkpoint in llama.cpp itself before it is published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.errors import VerificationError
from spinecli.exports import llamacpp
from spinecli.exports.config import Quantization

PROBE_LENGTH = 32
LARGEST_FILE = 1 << 30
"""Larger files are opened for their tokenizer only."""
_TOLERANCE = 0.05
"""Relative; far above what rounding to f16 does, far below what a wrong tensor does."""


@dataclass(frozen=True)
class Verdict:
    """What llama.cpp made of a file."""

    logit_difference: float | None
    """Largest difference from the checkpoint's logits, relative to the largest of those; None if not computed."""
    texts: int
    """Texts that were cut into tokens."""
    texts_alike: int
    """Those that llama.cpp cuts as the checkpoint's tokenizer does."""


def verify(
    path: Path, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None, quantization: Quantization
) -> Verdict:
    """Open the file in llama.cpp, cut texts into tokens and, if it is small enough, compute logits.

    Args:
        tokenizer: None if the file has no tokenizer.

    Raises: VerificationError if llama.cpp does not open the file or computes something else from unquantised weights.
    """
    computes = path.stat().st_size <= LARGEST_FILE
    with llamacpp.opened(path, vocabulary_only=not computes, context=PROBE_LENGTH) as model:
        alike = [] if tokenizer is None else [_cuts_alike(model, tokenizer, text) for text in llamacpp.TEXTS]
        difference = _difference(model, checkpoint) if computes else None
    unquantised = quantization in (Quantization.f32, Quantization.f16)
    if difference is not None and unquantised and not difference <= _TOLERANCE:
        raise VerificationError(
            f"llama.cpp's logits differ from the checkpoint's by {difference:.1%} of the largest; nothing was kept."
        )
    return Verdict(difference, len(alike), sum(alike))


def _cuts_alike(model: object, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return llamacpp.token_ids(model, text) == list(tokenizer(text)["input_ids"])


def _difference(model: object, checkpoint: Checkpoint) -> float:
    tokens = probe_tokens(int(checkpoint.config.vocab_size))
    expected = streamed_logits(checkpoint, tokens[None])[0]
    return relative_difference(llamacpp.logits(model, tokens.tolist()), expected)


def probe_tokens(vocabulary: int) -> Tensor:
    """One row of tokens, the same for every model with a vocabulary of that size: (tokens,) int64."""
    return torch.randint(vocabulary, (PROBE_LENGTH,), generator=torch.Generator().manual_seed(0))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    return float((found - expected).abs().max() / expected.abs().max())
