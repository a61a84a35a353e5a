"""What a command is asked for about the texts and examples that it reads."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from spinecli.config import Config, Option

Task = Literal["classification", "language"]
"""What is learned from labelled or plain examples."""


class SpecialTokens(str, Enum):
    """What a row has besides text."""

    auto = "auto"
    """What the tokenizer puts in front of every text, around it for an encoder: the model was trained to see that."""
    none = "none"
    """Nothing."""


def as_several(value: Any) -> Any:
    """A word that stands alone, as a tuple of one."""
    return (value,) if isinstance(value, str) else value


class CalibrationConfig(Config):
    """Which text to calibrate on, and how much of it."""

    text: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(as_several),
        Option(
            "Text to calibrate on: a .txt, .jsonl, .csv or .parquet file, a hub data set, builtin:python-docs, or "
            "self, which the model writes; may be repeated. A weight may follow, as in chat.jsonl:0.3.",
            name="calibration",
            default="self; for encoders and classifiers builtin:python-docs; for builtin:tiny its own language",
            decides=False,
        ),
    ] = None
    """Words as `read_sources` reads them."""
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
