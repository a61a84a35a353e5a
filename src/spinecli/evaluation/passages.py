"""The texts of an evaluation, cut into the windows that each model sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.calibration.rows import load_tokenizer
from spinecli.data.text import Text, load_text
from spinecli.errors import OptionError
from spinecli.evaluation.models import Subject
from spinecli.evaluation.perplexity import Windowing, text_windows
from spinecli.evaluation.settings import DEFAULT_WINDOW, PerplexitySettings

# More than any tokenizer needs for prose; bounds what is fetched of a hub data set.
_CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True, eq=False)
class Passage:
    """One text."""

    text: Text
    windowing: Windowing
    windows: tuple[Tensor, ...]
    """One a model: (windows, window) int64."""

    def comparable(self, index: int) -> bool:
        """Whether model `index` sees the same tokens as the first one; else their perplexities have no common unit."""
        return torch.equal(self.windows[0], self.windows[index])


def read_passages(
    settings: PerplexitySettings, subjects: Sequence[Subject], note: Callable[[str], None]
) -> list[Passage]:
    """Read and cut all texts; `note` hears what is not as one would expect.

    Raises: OptionError, CalibrationTextError, TokenizerError, OfflineError.
    """
    windowing = _windowing(settings, subjects, note)
    return [_read(reference, windowing, subjects, note) for reference in settings.texts]


def _windowing(settings: PerplexitySettings, subjects: Sequence[Subject], note: Callable[[str], None]) -> Windowing:
    window = settings.window or DEFAULT_WINDOW
    for subject in subjects:
        limit = subject.positions
        if limit is None or window <= limit:
            continue
        if settings.window is not None:
            raise OptionError(
                f"A window of {window} tokens exceeds the {limit} positions of {subject.label}; lower --window."
            )
        note(f"Windows have {limit} tokens instead of {window}, because {subject.label} has no more positions.")
        window = limit
    return Windowing(window, window if settings.stride is None else settings.stride, settings.rows)


def _read(reference: str, windowing: Windowing, subjects: Sequence[Subject], note: Callable[[str], None]) -> Passage:
    text = load_text(reference, limit_characters=_CHARACTERS_PER_TOKEN * windowing.tokens)
    windows = tuple(
        text_windows(load_tokenizer(subject.path), text, windowing, vocabulary=subject.vocabulary)
        for subject in subjects
    )
    passage = Passage(text, windowing, windows)
    for index, subject in enumerate(subjects):
        if not passage.comparable(index):
            note(
                f"{subject.label} cuts {text.description} into other tokens than {subjects[0].label}, so their "
                "perplexities do not compare."
            )
    if len(windows[0]) < windowing.rows:
        note(f"{text.description} has {len(windows[0])} windows, fewer than {windowing.rows}.")
    return passage
