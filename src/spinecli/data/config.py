"""What a command is asked for about the texts and examples that it reads."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from spinecli.config import Config, Option

Task = Literal["classification", "language"]
"""What is learned from labelled or plain examples."""


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
            default="the built-in model's own language, otherwise builtin:python-docs",
            decides=False,
        ),
    ] = None
    rows: Annotated[int, Field(ge=1), Option("Number of calibration rows.", name="calibration-rows")] = 128
    length: Annotated[int, Field(ge=2), Option("Number of tokens in a calibration row.", name="calibration-length")] = (
        128
    )
    special_tokens: Annotated[
        SpecialTokens,
        Option(
            "How calibration rows begin. auto: with what the tokenizer puts in front of a text, such as <bos>; none: "
            "with the text itself."
        ),
    ] = SpecialTokens.auto


CALIBRATION = Option("The text that importance is measured on.", panel="Calibration")
"""Of the field that holds a `CalibrationConfig`."""


class ColumnsConfig(Config):
    """Which columns of a data set are read; None: those with the usual names."""

    text_column: Annotated[str | None, Option("Column that holds the text.", default="by its name", decides=False)] = (
        None
    )
    pair_column: Annotated[str | None, Option("Column that holds a second text, if there is one.", decides=False)] = (
        None
    )
    label_column: Annotated[
        str | None, Option("Column that holds the label.", default="by its name", decides=False)
    ] = None


class ExamplesConfig(ColumnsConfig):
    """What is read of a data set. The examples that come of it are an input of what is made with them."""

    task: Annotated[
        Task | None,
        Option("Task to train: classification or language.", default="as the columns suggest", decides=False),
    ] = None
    limit: Annotated[
        int | None,
        Field(ge=1),
        Option("Largest number of examples to take from each file, spread evenly over it.", decides=False),
    ] = None
