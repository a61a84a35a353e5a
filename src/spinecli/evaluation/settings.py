"""What to measure and how; every figure in a report can be traced to these."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from spinecli.evaluation.record import Record

DEFAULT_WINDOW = 256
DEFAULT_ROWS = 40
DEFAULT_PROMPT_LENGTH = 128
DEFAULT_MAX_LENGTH = 128
DEFAULT_EXAMPLES = 2000


class PerplexitySettings(Record):
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


class TaskSettings(Record):
    """What lm-eval runs."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    seed: int = 1234
    """Chooses few-shot examples; 1234 is lm-eval's own default."""


class LabelledSettings(Record):
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


class GenerationSettings(Record):
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


class Settings(Record):
    """One evaluation."""

    perplexity: PerplexitySettings | None = None
    """None: not measured."""
    tasks: TaskSettings | None = None
    """None: none are run."""
    labelled: LabelledSettings | None = None
    """None: not measured."""
    latency: bool = False
    memory: bool = False
    generation: GenerationSettings = GenerationSettings()
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    """Threads of torch; None: as many as torch chooses."""
