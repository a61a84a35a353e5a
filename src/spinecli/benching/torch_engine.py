"""Models in torch: an evaluation of speed and memory, and what the shapes promise beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.benching.cost import checkpoint_cost
from spinecli.benching.results import EngineResult, Run, Work
from spinecli.benching.settings import BenchSettings
from spinecli.benching.speedups import compared, spread
from spinecli.evaluation.models import Subject, weights_of
from spinecli.evaluation.results import ModelResult
from spinecli.evaluation.session import Listeners, Session, open_session
from spinecli.evaluation.settings import DEFAULT_PROMPT_LENGTH, GenerationSettings, Settings


def open_torch(
    subjects: Sequence[Subject], settings: BenchSettings, listeners: Listeners, stopwatch: Stopwatch
) -> Session:
    """Check device, kinds and lengths; nothing is loaded. Raises: OptionError."""
    measures = Settings(
        latency=True,
        memory=True,
        generation=settings.generation,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
    )
    return open_session(subjects, measures, listeners, stopwatch)


def bench_torch(session: Session) -> EngineResult:
    """Time all models in turns, all of them in memory, then measure each in a fresh process.

    Raises: MeasurementError, NonFiniteWeightsError.
    """
    settings, generation = session.settings, session.settings.generation
    evaluation = session.measure()
    runs = [
        _run(subject, result, generation, settings.dtype)
        for subject, result in zip(session.subjects, evaluation.models, strict=True)
    ]
    return EngineResult(engine="torch", version=torch.__version__, runs=compared(runs))


def _run(subject: Subject, result: ModelResult, generation: GenerationSettings, dtype: str) -> Run:
    length, batch = generation.prompt_length or DEFAULT_PROMPT_LENGTH, generation.batch_size
    held = getattr(torch, dtype)
    cost = checkpoint_cost(subject.checkpoint, held)
    passes = result.latency.prefill if result.latency else result.forward.tokens if result.forward else None
    if passes is None or result.memory is None:
        raise ValueError("the session measured no speed or no memory")
    return Run(
        label=subject.label,
        precision=dtype,
        weight_bytes=weights_of(subject).parameters * held.itemsize,
        memory=result.memory,
        work=Work(
            pass_flops=cost.prefill_flops(length, batch),
            step_bytes=None if subject.classifies else cost.decode_bytes(length, generation.new_tokens, batch),
        ),
        pass_seconds=spread([batch * length / rate for rate in passes.samples]),
        latency=result.latency,
        forward=result.forward,
    )
