"""What to measure and how; every figure in a report can be traced to these."""

from __future__ import annotations

from pathlib import Path

from spinecli.evaluation.record import Record

DEFAULT_WINDOW = 256
DEFAULT_ROWS = 40
DEFAULT_PROMPT_LENGTH = 128


class PerplexitySettings(Record):
    """Texts and how they are cut into windows."""

    texts: tuple[str, ...]
    window: int | None = None
    """Tokens a window; None: 256, or as many as every model has positions for."""
    stride: int | None = None
    """Tokens from one window's start to the next; None: the window's length, so windows are disjoint."""
    rows: int = DEFAULT_ROWS
    """At most this many windows from the start of the text."""


class TaskSettings(Record):
    """What lm-eval runs."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    seed: int = 1234
    """Chooses few-shot examples; 1234 is lm-eval's own default."""


class GenerationSettings(Record):
    """The generation that is timed, and whose memory is measured."""

    prompt_length: int | None = None
    """Tokens; None: 128, or as many as every model leaves room for. A measured evaluation holds the number."""
    new_tokens: int = 32
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
    latency: bool = False
    memory: bool = False
    generation: GenerationSettings = GenerationSettings()
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    """Threads of torch; None: as many as torch chooses."""
