"""What an evaluation found, as records: the schema of results.json."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from spinecli.evaluation.record import Record
from spinecli.evaluation.settings import GenerationSettings, Settings

RESULTS_NAME = "results.json"
RESULTS_FORMAT = 1

Better = Literal["lower", "higher", "neither"]
Computation = Literal["loaded model", "block stream"]
Form = Literal["count", "bytes", "rate", "score"]


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
    computed_by: Computation
    comparable: bool
    """False if this model cuts the text into other tokens than the reference does."""


class Rates(Record):
    """Tokens per second over the repeats."""

    median: float
    minimum: float
    maximum: float
    samples: tuple[float, ...]
    """In the order of the rounds; sample i of every model was taken in the same round."""


class LatencyResult(Record):
    """Speed with a KV cache."""

    prefill: Rates
    decode: Rates


class MemoryResult(Record):
    """Resident memory of a fresh process that loads the model and generates."""

    peak_bytes: int
    before_loading_bytes: int
    """Peak up to the moment before loading: Python and its libraries."""
    added_bytes: int
    """What loading and generating added to that peak."""
    device_peak_bytes: int | None
    """Peak allocated on a CUDA device; None elsewhere."""


class ModelResult(Record):
    """Everything measured of one model."""

    label: str
    reference: str
    adapter: str | None
    weights: Weights
    perplexity: tuple[PerplexityResult, ...] = ()
    latency: LatencyResult | None = None
    memory: MemoryResult | None = None
    lm_eval: dict[str, JsonValue] | None = None
    """lm-eval's own results, as it returns them."""


class Row(Record):
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
    settings: Settings
    machine: dict[str, JsonValue]
    models: tuple[ModelResult, ...]
    comparison: tuple[Row, ...]

    @property
    def generation(self) -> GenerationSettings:
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
