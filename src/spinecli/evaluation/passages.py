"""The texts of an evaluation, cut into the windows that each model sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.data.rows import Frame, frame_of
from spinecli.data.text import Text, load_text
from spinecli.evaluation.config import DEFAULT_WINDOW, PerplexityConfig
from spinecli.evaluation.lengths import fit_row_length
from spinecli.evaluation.models import Subject
from spinecli.evaluation.perplexity import Windowing, text_windows

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
