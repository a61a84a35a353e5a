"""What to measure and how; every figure in a report can be traced to these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from spinecli.artifacts.record import Record
from spinecli.errors import OptionError

DEFAULT_WINDOW = 256
DEFAULT_ROWS = 40
DEFAULT_PROMPT_LENGTH = 128
DEFAULT_MAX_LENGTH = 128
DEFAULT_EXAMPLES = 2000


class PerplexityConfig(Record):
    """Texts and how they are cut into windows."""

    texts: tuple[str, ...]
    window: int | None = None
    """Tokens a window; None: 256, or as many as every model has positions for."""
    stride: int | None = None
    """Tokens from one window's start to the next; None: the window's length, so windows are disjoint."""
    rows: int = DEFAULT_ROWS
    """At most this many windows from the start of the text."""
    special_tokens: Literal["auto", "none"] = "auto"
    """What opens a window: what the tokenizer puts in front of a text, or nothing."""


class TaskConfig(Record):
    """What lm-eval runs."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    seed: int = 1234
    """Chooses few-shot examples; 1234 is lm-eval's own default."""


class LabelledConfig(Record):
    """Labelled examples that classifiers answer."""

    data: str
    """As the user named it."""
    text_column: str | None = None
    """None: recognised by its name, as are the two below."""
    pair_column: str | None = None
    label_column: str | None = None
    max_length: int | None = None
    """Longest row in tokens; None: 128, or as many as every model has positions for. A measured evaluation holds the
    number."""
    examples: int = DEFAULT_EXAMPLES
    """At most this many, spread evenly over the data."""


class GenerationConfig(Record):
    """The generation that is timed, and whose memory is measured; of a classifier, one forward pass."""

    prompt_length: int | None = None
    """Tokens; None: 128, or as many as every model leaves room for. A measured evaluation holds the number. Of a
    classifier, the tokens of a row."""
    new_tokens: int = 32
    """A measured evaluation of classifiers, which generate nothing, holds 0."""
    batch_size: int = 1
    repeats: int = 5
    """Timed rounds; each times every model once."""
    warmup: int = 1
    """Rounds before them that are not counted."""


class EvaluateConfig(Record):
    """One evaluation."""

    perplexity: PerplexityConfig | None = None
    """None: not measured."""
    tasks: TaskConfig | None = None
    """None: none are run."""
    labelled: LabelledConfig | None = None
    """None: not measured."""
    latency: bool = False
    memory: bool = False
    generation: GenerationConfig = GenerationConfig()
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    """Threads of torch; None: as many as torch chooses."""


def fit_row_length(
    asked: int | None,
    default: int,
    positions: Mapping[str, int | None],
    option: str,
    note: Callable[[str], None],
    rows: str = "Rows",
) -> int:
    """The length that was asked for; else the default, or as many tokens as every model has positions for.

    Args:
        positions: label -> positions of a model; None if it has no limit.
        option: the command-line option that asks for a length.
        rows: what the rows are called.

    Raises: OptionError if a model has no room for the length that was asked for.
    """
    length = default if asked is None else asked
    for label, limit in positions.items():
        if limit is None or length <= limit:
            continue
        if asked is not None:
            raise OptionError(f"{rows} of {length} tokens exceed the {limit} positions of {label}; lower {option}.")
        note(f"{rows} have at most {limit} tokens instead of {length}, because {label} has no more positions.")
        length = limit
    return length
