"""What an evaluation found, as records: the schema of results.json."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from spinecli.artifacts.record import Record
from spinecli.checkpoints.cut_picture import BlockCut
from spinecli.evaluation.config import EvaluateConfig, GenerationConfig
from spinecli.healing.curve import Curve

RESULTS_NAME = "results.json"
RESULTS_FORMAT = 1

Better = Literal["lower", "higher", "neither"]
Computation = Literal["loaded model", "block stream"]
Form = Literal["count", "bytes", "rate", "score", "share"]
"""How a figure is written; a share lies between 0 and 1."""
Matching = Literal["name", "position"]


class Weights(Record):
    """What a model is, from its headers alone."""

    parameters: int
    """All parameters of the checkpoint, a tied head counted once, the adapter not counted."""
    block_parameters: int
    adapter_parameters: int
    bytes_on_disk: int
    """Bytes of the weight tensors as they are stored."""
    flops_per_token: int
    """Of one forward pass at a context of 256 tokens, the adapter's included."""


class PerplexityResult(Record):
    """Perplexity on one text."""

    text: str
    """As the user named it."""
    description: str
    perplexity: float
    nll: float
    """Mean negative log-likelihood in nats over the scored tokens."""
    scored_tokens: int
    windows: int
    window: int
    stride: int
    opened_by: str = ""
    """The special tokens in front of every window; empty if there are none."""
    computed_by: Computation
    comparable: bool
    """False if this model cuts the text into other tokens than the reference does."""


class ClassificationResult(Record):
    """Answers to labelled examples."""

    data: str
    """As the user named it."""
    description: str
    """What was measured on, its validation part for instance."""
    accuracy: float
    accuracy_error: float
    """One standard error."""
    nll: float
    """Mean negative log-likelihood of the right label in nats."""
    macro_f1: float
    """Mean of `f1` over the labels that the examples have."""
    f1: dict[str, float]
    """By label: harmonic mean of precision and recall."""
    examples: int
    shortened: int
    """Examples that were cut to `max_length` tokens."""
    max_length: int
    matched_by: Matching
    """How the labels of the data were found among those of the model."""


class Rates(Record):
    """Something per second over the repeats."""

    median: float
    minimum: float
    maximum: float
    samples: tuple[float, ...]
    """In the order of the rounds; sample i of every model was taken in the same round."""


class LatencyResult(Record):
    """Speed with a KV cache, in tokens per second."""

    prefill: Rates
    decode: Rates


class ForwardResult(Record):
    """Speed of a classifier's forward passes."""

    rows: Rates
    tokens: Rates


class MemoryResult(Record):
    """Resident memory of a fresh process that loads the model and generates, or classifies one batch."""

    peak_bytes: int
    before_loading_bytes: int
    """Peak up to the moment before loading: Python and its libraries."""
    added_bytes: int
    """What came on top of that peak."""
    device_peak_bytes: int | None
    """Peak allocated on a CUDA device; None elsewhere."""


class Continuation(Record):
    """What a language model says after a few words."""

    prompt: str
    text: str
    """What follows the prompt, each token the likeliest; empty if the model ends there."""


class ModelResult(Record):
    """Everything measured of one model."""

    label: str
    reference: str
    adapter: str | None
    weights: Weights
    cut: tuple[BlockCut, ...] = ()
    """What every block of the model that this one was cut from keeps; empty if the checkpoint does not say."""
    healing: Curve | None = None
    """How spine heal trained this checkpoint."""
    perplexity: tuple[PerplexityResult, ...] = ()
    classification: ClassificationResult | None = None
    latency: LatencyResult | None = None
    """Of a language model."""
    forward: ForwardResult | None = None
    """Of a classifier."""
    memory: MemoryResult | None = None
    continuations: tuple[Continuation, ...] = ()
    """Of a language model that was loaded to be measured."""
    lm_eval: dict[str, JsonValue] | None = None
    """lm-eval's own results, as it returns them."""


class ComparisonRow(Record):
    """One figure over all models."""

    figure: str
    better: Better
    form: Form
    values: tuple[float | None, ...]
    """One a model; None where it was not measured."""
    deviations: tuple[float | None, ...] = ()
    """Standard errors, where the measure comes with them."""
    ratios: tuple[float | None, ...]
    """Value divided by the first model's; None where that means nothing."""


class Evaluation(Record):
    """The whole of results.json. The first model is the reference of all ratios."""

    results_format: int = RESULTS_FORMAT
    settings: EvaluateConfig
    machine: dict[str, JsonValue]
    models: tuple[ModelResult, ...]
    comparison: tuple[ComparisonRow, ...]

    @property
    def generation(self) -> GenerationConfig:
        """The generation behind speed and memory."""
        return self.settings.generation

    @property
    def ran_tasks(self) -> bool:
        """Whether lm-eval's tasks are among the measures."""
        return any(model.lm_eval for model in self.models)

    @property
    def lm_eval_version(self) -> str:
        """The lm-eval that ran the tasks; empty if none did."""
        return next((str(model.lm_eval["lm_eval_version"]) for model in self.models if model.lm_eval), "")
