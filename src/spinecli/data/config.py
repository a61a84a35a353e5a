"""What a command is asked for about the texts and examples that it reads."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from spinecli.config import Config, Option


class SpecialTokens(str, Enum):
    """What a row has besides text."""

    auto = "auto"
    """What the tokenizer puts in front of every text, around it for an encoder: the model was trained to see that."""
    none = "none"
    """Nothing."""


class CalibrationConfig(Config):
    """Which text to calibrate on, and how much of it."""

    text: Annotated[
        str | None,
        Option(
            "Text to calibrate on: a .txt, .jsonl, .csv or .parquet file, a hub data set, or builtin:python-docs.",
            name="calibration",
            default="a built-in model's own language, else text that every Python has",
            decides=False,
        ),
    ] = None
    rows: Annotated[int, Field(ge=1), Option("Rows of calibration text.", name="calibration-rows")] = 128
    length: Annotated[int, Field(ge=2), Option("Tokens per calibration row.", name="calibration-length")] = 128
    special_tokens: Annotated[
        SpecialTokens,
        Option("auto: every row begins as the tokenizer begins a text, with <bos> for instance; none: with text."),
    ] = SpecialTokens.auto


CALIBRATION = Option("The text that importance is measured on.", panel="Calibration")
"""Of the field that holds a `CalibrationConfig`."""
