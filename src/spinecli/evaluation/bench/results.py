"""What a benchmark found, as records: the schema of its results.json."""

from __future__ import annotations

from pydantic import JsonValue

from spinecli.artifacts.record import Record
from spinecli.evaluation.bench.config import BenchConfig, Engine
from spinecli.evaluation.results import ForwardResult, LatencyResult, MemoryResult

RESULTS_FORMAT = 1


class Spread(Record):
    """One figure over the rounds that count."""

    median: float
    minimum: float
    maximum: float
    samples: tuple[float, ...]
    """In the order of the rounds; sample i of every model of an engine was taken in the same round."""


class Speedup(Record):
    """How much faster than the engine's first model."""

    measured: Spread
    """This model's rate divided by the first model's in the same round."""
    promised: float
    """The first model's FLOPs divided by this one's, of decoding the bytes read."""


class Speedups(Record):
    """Those of a language model, or that of a classifier."""

    prefill: Speedup | None = None
    """Against FLOPs."""
    decode: Speedup | None = None
    """Against bytes."""
    forward: Speedup | None = None
    """Against FLOPs."""


class PromisedWork(Record):
    """What a model's shapes ask for, before anything is timed."""

    pass_flops: float
    """FLOPs of the prefill, or of a classifier's pass, over all rows."""
    step_bytes: float | None
    """Bytes that a decode step reads, in the mean over the steps: all weights, and all keys and values so far. None of
    a classifier, which has no such step."""


class EngineRun(Record):
    """One model in one engine."""

    label: str
    precision: str
    """What most weights are stored as in memory."""
    weight_bytes: int
    """All weights in memory, a tied head counted once."""
    memory: MemoryResult
    work: PromisedWork
    pass_seconds: Spread
    """Time to the first token, or of a classifier's pass."""
    latency: LatencyResult | None
    """Of a language model."""
    forward: ForwardResult | None
    """Of a classifier."""
    speedups: Speedups | None = None
    """None of the first model of the engine, which the others are compared with."""


class EngineResult(Record):
    """All models that ran in one engine, in the order in which they were named."""

    engine: Engine
    version: str
    runs: tuple[EngineRun, ...]


class ModelFacts(Record):
    """What a model is, from its headers alone."""

    label: str
    reference: str
    """As the user named it."""
    parameters: int
    block_parameters: int


class BenchResults(Record):
    """The whole of results.json."""

    results_format: int = RESULTS_FORMAT
    settings: BenchConfig
    """With the prompt length that was used."""
    machine: dict[str, JsonValue]
    models: tuple[ModelFacts, ...]
    engines: tuple[EngineResult, ...]
