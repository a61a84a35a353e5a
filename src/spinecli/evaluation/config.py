"""What `spine eval` is asked for: which models, which measures, and how each is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from spinecli.config import Config, Device, Dtype, Model, Option
from spinecli.data.config import SpecialTokens, as_several

DEFAULT_WINDOW = 256
DEFAULT_PROMPT_LENGTH = 128
DEFAULT_MAX_LENGTH = 128


def _at_commas(value: Any) -> Any:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        return value
    return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())


Names = Annotated[tuple[str, ...], BeforeValidator(_at_commas)]
"""Names separated by commas, or several of such."""
Several = Annotated[tuple[str, ...], BeforeValidator(as_several)]
"""Any number of references; one may stand alone."""


def _some_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("names no task; write names separated by commas.")
    return names


class TextConfig(Config):
    """Texts to measure perplexity on, and how much of them."""

    texts: Annotated[
        Several,
        Option(
            "Text to measure perplexity on: a text file, a table with a column of texts or conversations, a hub data "
            "set, or builtin:NAME; may be repeated.",
            name="perplexity",
            default="a built-in text, if perplexity is measured without one",
            decides=False,
        ),
    ] = ()
    window: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Number of tokens in a window.", default=f"{DEFAULT_WINDOW}, or as many as every model has positions for"
        ),
    ] = None
    rows: Annotated[int, Field(ge=1), Option("Largest number of windows, from the start of the text.")] = 40


class PerplexityConfig(TextConfig):
    """Texts, and how they are cut into windows."""

    stride: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Number of tokens from the start of one window to the next.", default="the window, so that none overlap"
        ),
    ] = None
    special_tokens: Annotated[
        SpecialTokens,
        Option(
            "How windows begin. auto: with what the tokenizer puts in front of a text, such as <bos>; none: with the "
            "text itself."
        ),
    ] = SpecialTokens.auto


class TaskConfig(Config):
    """What lm-eval runs."""

    names: Annotated[
        Names,
        AfterValidator(_some_tasks),
        Option("Names of lm-eval tasks, groups or tags, separated by commas; mmlu_* works.", name="tasks"),
    ]
    include_path: Annotated[Path | None, Option("Directory with your own task files.")] = None
    limit: Annotated[
        int | None, Field(ge=1), Option("Number of examples of each task, from its first.", default="all")
    ] = None
    num_fewshot: Annotated[
        int | None, Field(ge=0), Option("Number of examples in the prompt.", default="what the task says")
    ] = None
    batch_size: Annotated[int, Field(ge=1), Option("Number of requests to compute together.")] = 8
    seed: Annotated[
        int, Field(ge=0), Option("Seed for choosing few-shot examples; the default is lm-eval's.", decides=False)
    ] = 1234


class LabelledConfig(Config):
    """Labelled examples that classifiers answer."""

    data: Annotated[
        str,
        Option(
            "Labelled examples to measure classifiers on: a file, a directory, a hub data set, or builtin:tiny-topics.",
            name="labelled",
            decides=False,
        ),
    ]
    text_column: Annotated[str | None, Option("Column that holds the text.", default="by its name")] = None
    pair_column: Annotated[
        str | None, Option("Column that holds a second text, if there is one.", default="by its name")
    ] = None
    label_column: Annotated[str | None, Option("Column that holds the label.", default="by its name")] = None
    max_length: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Length of the longest row in tokens; longer texts are truncated.",
            default=f"{DEFAULT_MAX_LENGTH}, or as many as every model has positions for",
        ),
    ] = None
    examples: Annotated[int, Field(ge=1), Option("Largest number of examples, spread evenly over the data.")] = 2000


class GenerationConfig(Config):
    """The generation that is timed, and whose memory is measured; of a classifier, one forward pass."""

    prompt_length: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Number of tokens in the prompt, or in a classifier's row.",
            default=f"{DEFAULT_PROMPT_LENGTH}, or what every model has room for",
        ),
    ] = None
    new_tokens: Annotated[
        int,
        Field(ge=0),
        Option(
            "Number of tokens to generate greedily with a KV cache, at least 2; the first belongs to the prefill. "
            "Classifiers generate none."
        ),
    ] = 32
    batch_size: Annotated[
        int, Field(ge=1), Option("Number of sequences to generate, or rows to classify, together.")
    ] = 1
    repeats: Annotated[
        int,
        Field(ge=1),
        Option("Number of timed rounds, after one that does not count; each round times every model once."),
    ] = 5
    warmup: int = 1
    """Rounds before them that are not counted."""

    @property
    def length(self) -> int:
        """Tokens of the prompt, or of a classifier's row."""
        return self.prompt_length or DEFAULT_PROMPT_LENGTH


_SPEED = "Speed and memory"


class EvaluateConfig(Config):
    """Which models to measure, and by what."""

    model: Model
    against: Annotated[
        Several,
        Option("Another model to compare with; may be repeated. Ratios are to the first one.", decides=False),
    ] = ()
    adapter: Annotated[
        Path | None, Option("Directory of a PEFT adapter to load onto MODEL, unmerged.", decides=False)
    ] = None
    perplexity: Annotated[PerplexityConfig | None, Option("Perplexity of language models.", panel="Perplexity")] = None
    """None: not measured."""
    tasks: Annotated[TaskConfig | None, Option("Tasks of lm-eval.", panel="lm-eval tasks")] = None
    """None: none are run."""
    labelled: Annotated[LabelledConfig | None, Option("Answers of classifiers.", panel="Classification")] = None
    """None: not measured."""
    latency: Annotated[
        bool,
        Option("Measure speed in tokens per second: prefill and decode, or a classifier's forward pass.", panel=_SPEED),
    ] = False
    memory: Annotated[bool, Option("Measure peak memory, in a fresh process for each model.", panel=_SPEED)] = False
    generation: Annotated[
        GenerationConfig, Option("What is timed.", panel=_SPEED, renamed={"batch_size": "sequences"})
    ] = GenerationConfig()
    threads: Annotated[
        int | None, Field(ge=1), Option("Number of threads that torch uses.", default="torch's choice")
    ] = None
    device: Device = "cpu"
    dtype: Dtype = "float32"

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts that are named to measure perplexity on."""
        return self.perplexity.texts if self.perplexity else ()

    @property
    def names_a_measure(self) -> bool:
        """Whether anything to measure is named; if not, what suits the models is measured."""
        return bool(self.texts or self.tasks or self.labelled or self.latency or self.memory)
