"""Perplexity of a causal language model on a text.

The text's tokens are cut into windows of equal length. A window's first tokens may be context only:

    stride = window    |0 1 2 3|4 5 6 7|          disjoint rows; token 0 of each has no context and is not scored
                        . s s s . s s s
    stride < window    |0 1 2 3|                  every later window scores its last `stride` tokens,
                        . s s s                   so that no token is scored twice and all but the first
                           |2 3 4 5|              `window` see at least `window - stride` tokens before them
                            . . s s

Every window is opened by the special tokens that the tokenizer puts in front of a text, if it has any: they count into
the window's length, are not scored, and the windows of text behind them are what is cut as above. Perplexity is exp of
the mean negative log-likelihood over the scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import CHUNK_TOKENS, BlockStream, ComputeOptions
from spinecli.data.rows import NO_FRAME, Frame, first_tokens, frame_of
from spinecli.data.text import Text, load_text
from spinecli.errors import CalibrationTextError, MeasurementError, OptionError
from spinecli.evaluation.config import DEFAULT_WINDOW, PerplexityConfig
from spinecli.evaluation.lengths import fit_row_length
from spinecli.evaluation.models import Subject
from spinecli.evaluation.results import Computation

# Hidden states that a pass of the block stream may hold: bounds memory when many windows are asked for.
_HIDDEN_BYTES = 512 << 20


@dataclass(frozen=True)
class Windowing:
    """How a text becomes windows."""

    window: int
    """Tokens a window."""
    stride: int
    """Tokens from one window's start to the next, 1 to the window's tokens of text."""
    rows: int
    """At most this many windows."""
    opening: int = 0
    """Special tokens at the start of every window."""

    def __post_init__(self) -> None:
        if self.window < 2 + max(0, self.opening - 1):
            raise OptionError(f"A window must hold at least 2 tokens, not {self.window}; raise --window.")
        if not 1 <= self.stride <= self.text:
            raise OptionError(
                f"The stride must lie between 1 and the window's {self.text} tokens of text, not {self.stride}; "
                "change --stride or --window."
            )
        if self.rows < 1:
            raise OptionError(f"At least 1 window must be measured, not {self.rows}; raise --rows.")

    @property
    def text(self) -> int:
        """Tokens of text in a window."""
        return self.window - self.opening

    @property
    def tokens(self) -> int:
        """Tokens of text that all windows cover."""
        return self.text + (self.rows - 1) * self.stride

    def first_scored(self, index: int) -> int:
        """Position in window `index` from which on tokens are scored."""
        first = max(1, self.opening)
        return first if index == 0 else max(first, self.window - self.stride)

    def cut(self, tokens: Tensor) -> Tensor:
        """The text of the windows: (n,) int64, n at least `text` -> (windows, text)."""
        return tokens.unfold(0, self.text, self.stride)[: self.rows]


@dataclass(frozen=True)
class TextScore:
    """A model's loss on a text."""

    nll: float
    """Mean negative log-likelihood in nats."""
    tokens: int
    """Number of scored tokens."""

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


class LogitSource(Protocol):
    """Anything that computes logits of rows of tokens."""

    @property
    def name(self) -> Computation:
        """How it computes, for the report."""

    def __call__(self, tokens: Tensor, context: RunContext) -> Iterator[Tensor]:
        """Tokens (rows, length) -> chunks of logits (chunk, length, vocabulary) in float32, in the rows' order."""


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    windowing: Windowing,
    *,
    frame: Frame = NO_FRAME,
    vocabulary: int | None = None,
) -> Tensor:
    """The windows of a text's start: (windows, window) int64, as many as the text has, at most `windowing.rows`.

    Args:
        frame: its opening, `windowing.opening` tokens, stands in front of every window.

    Raises: CalibrationTextError if the text is shorter than one window, TokenizerError.
    """
    tokens = first_tokens(tokenizer, text, windowing.tokens, frame, vocabulary)
    if len(tokens) < windowing.text:
        raise CalibrationTextError(
            f"{text.reference} has {len(tokens)} tokens, fewer than one window of {windowing.text}; "
            "name a longer text or a smaller --window."
        )
    texts = windowing.cut(tokens)
    return torch.cat([texts.new_tensor(frame.opening).expand(len(texts), -1), texts], dim=1)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token after the first.

    Args:
        logits: (rows, length, vocabulary) float32.
        tokens: (rows, length) int64.

    Returns: (rows, length - 1) float64 on the CPU.
    """
    targets = tokens[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).cpu().double()


def score(logits: Iterable[Tensor], windows: Tensor, windowing: Windowing) -> TextScore:
    """The loss over the scored tokens of all windows.

    `logits` comes in chunks of (chunk, window, vocabulary) that together have one row a window; `windows` is
    (windows, window) int64.

    Raises: MeasurementError if the loss is NaN, infinite, or too large for a perplexity.
    """
    total, count, row = 0.0, 0, 0
    for chunk in logits:
        losses = token_losses(chunk, windows[row : row + len(chunk)])
        for line in losses:
            scored = line[windowing.first_scored(row) - 1 :]
            total += float(scored.sum())
            count += len(scored)
            row += 1
    nll = total / count
    if not nll < math.log(float(torch.finfo(torch.float64).max)):
        raise MeasurementError(
            f"The loss is {nll}, which has no perplexity; compute with --dtype float32, or the model is broken."
        )
    return TextScore(nll, count)


@dataclass(frozen=True, eq=False)
class LoadedLogits:
    """Logits from a model in memory."""

    model: nn.Module
    device: str
    name: Computation = "loaded model"

    @torch.no_grad()
    def __call__(self, tokens: Tensor, context: RunContext) -> Iterator[Tensor]:
        """See `LogitSource`."""
        done = 0
        for chunk in torch.split(tokens, max(1, CHUNK_TOKENS // tokens.shape[1])):
            yield self.model(input_ids=chunk.to(self.device), use_cache=False).logits.float()
            done += len(chunk)
            context.progress("perplexity", done, len(tokens))


@dataclass(frozen=True, eq=False)
class StreamedLogits:
    """Logits from a checkpoint on disk, with one block's weights in memory at a time."""

    checkpoint: Checkpoint
    compute: ComputeOptions
    name: Computation = "block stream"

    @torch.no_grad()
    def __call__(self, tokens: Tensor, context: RunContext) -> Iterator[Tensor]:
        """See `LogitSource`."""
        length = tokens.shape[1]
        stream = BlockStream(self.checkpoint, length, self.compute)
        row_bytes = length * self.checkpoint.d_model * self.compute.dtype.itemsize
        passes = torch.split(tokens, max(1, _HIDDEN_BYTES // row_bytes))
        done = 0
        for rows in passes:
            hidden = stream.embed(rows)
            for block in stream.loaded_blocks():
                hidden = stream.run(block, hidden)
                done += 1
                context.progress("perplexity", done, stream.blocks * len(passes))
            yield from stream.logits(hidden)


# More than any tokenizer needs for prose; bounds what is fetched of a hub data set.
_CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True, eq=False)
class TextWindows:
    """A text as one model sees it."""

    tokens: Tensor
    """(windows, window) int64."""
    windowing: Windowing
    frame: Frame
    """Its opening stands in front of every window."""


@dataclass(frozen=True, eq=False)
class Passage:
    """One text."""

    text: Text
    windows: tuple[TextWindows, ...]
    """One a model."""

    def comparable(self, index: int) -> bool:
        """Whether model `index` sees the same tokens as the first one; else their perplexities have no common unit."""
        return torch.equal(self.windows[0].tokens, self.windows[index].tokens)


def read_passages(config: PerplexityConfig, subjects: Sequence[Subject], note: Callable[[str], None]) -> list[Passage]:
    """Read and cut all texts; `note` hears what is not as one would expect.

    Raises: OptionError, CalibrationTextError, TokenizerError, OfflineError.
    """
    positions = {subject.label: subject.positions for subject in subjects}
    window = fit_row_length(config.window, DEFAULT_WINDOW, positions, "--window", note, "Windows")
    tokenizers = [subject.tokenizer for subject in subjects]
    frames = [
        frame_of(subject.checkpoint, tokenizer, config.special_tokens)
        for subject, tokenizer in zip(subjects, tokenizers, strict=True)
    ]
    windowings = [_windowing(config, window, frame) for frame in frames]
    passages = []
    for reference in config.texts:
        longest = max(windowing.tokens for windowing in windowings)
        text = load_text(reference, limit_characters=_CHARACTERS_PER_TOKEN * longest)
        windows = []
        for subject, tokenizer, windowing, frame in zip(subjects, tokenizers, windowings, frames, strict=True):
            tokens = text_windows(tokenizer, text, windowing, frame=frame, vocabulary=subject.vocabulary)
            windows.append(TextWindows(tokens, windowing, frame))
        passages.append(Passage(text, tuple(windows)))
        _tell(passages[-1], subjects, note)
    return passages


def _windowing(config: PerplexityConfig, window: int, frame: Frame) -> Windowing:
    opening = len(frame.opening)
    # as many tokens as a window has mean windows side by side, whatever opens them
    disjoint = config.stride is None or config.stride == window
    return Windowing(window, window - opening if disjoint else config.stride or 0, config.rows, opening)


def _tell(passage: Passage, subjects: Sequence[Subject], note: Callable[[str], None]) -> None:
    first, text = passage.windows[0], passage.text.description
    for index, subject in enumerate(subjects):
        if not passage.comparable(index):
            note(
                f"{subject.label} cuts {text} into other tokens than {subjects[0].label}, so their perplexities do not "
                "compare."
            )
    if len(first.tokens) < first.windowing.rows:
        note(f"{text} has {len(first.tokens)} windows, fewer than {first.windowing.rows}.")
