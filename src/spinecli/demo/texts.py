"""Texts of the built-in language that are there on every machine, made on demand."""

from __future__ import annotations

from typing import Literal

from spinecli.demo.language import Document, generate

Split = Literal["calibration", "evaluation"]

_SEEDS: dict[Split, int] = {"calibration": 800_001, "evaluation": 800_002}
_STORIES: dict[Split, int] = {"calibration": 530, "evaluation": 180}


def demo_documents(split: Split) -> list[Document]:
    """The stories of a split: about 60,000 words to calibrate with or 20,000 to evaluate on."""
    return generate(_STORIES[split], _SEEDS[split])


def demo_text(split: Split) -> str:
    """The stories of a split, one on each line; takes well under a second."""
    return "".join(story.text + "\n" for story in demo_documents(split))
