"""One benchmark, from open models to results: what can be wrong is checked first, then engine after engine runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.stream.block_stream import compute_options
from spinecli.errors import MissingPackageError, OptionError, UserError
from spinecli.evaluation.bench.cost import checkpoint_cost, compared, spread
from spinecli.evaluation.bench.llama_cpp_engine import LabelledFile, bench_llama_cpp
from spinecli.evaluation.bench.llama_cpp_model import import_llama_cpp
from spinecli.evaluation.bench.models import Convertible, Model, convertible, gguf_files
from spinecli.evaluation.bench.results import BenchConfig, BenchResults, Engine, EngineResult, EngineRun, PromisedWork
from spinecli.evaluation.latency import fit_generation
from spinecli.evaluation.machine import machine_facts
from spinecli.evaluation.models import Subject, weights_of
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.evaluation.results import ModelResult
from spinecli.evaluation.session import Listeners, Session, open_session
from spinecli.evaluation.settings import DEFAULT_PROMPT_LENGTH, EvaluateConfig, GenerationConfig


def open_torch(
    subjects: Sequence[Subject], settings: BenchConfig, listeners: Listeners, stopwatch: Stopwatch
) -> Session:
    """Check device, kinds and lengths; nothing is loaded. Raises: OptionError."""
    measures = EvaluateConfig(
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


def _run(subject: Subject, result: ModelResult, generation: GenerationConfig, dtype: str) -> EngineRun:
    length, batch = generation.prompt_length or DEFAULT_PROMPT_LENGTH, generation.batch_size
    held = getattr(torch, dtype)
    cost = checkpoint_cost(subject.checkpoint, held)
    passes = result.latency.prefill if result.latency else result.forward.tokens if result.forward else None
    if passes is None or result.memory is None:
        raise ValueError("the session measured no speed or no memory")
    return EngineRun(
        label=subject.label,
        precision=dtype,
        weight_bytes=weights_of(subject).parameters * held.itemsize,
        memory=result.memory,
        work=PromisedWork(
            pass_flops=cost.prefill_flops(length, batch),
            step_bytes=None if subject.classifies else cost.decode_bytes(length, generation.new_tokens, batch),
        ),
        pass_seconds=spread([batch * length / rate for rate in passes.samples]),
        latency=result.latency,
        forward=result.forward,
    )


@dataclass(frozen=True, eq=False)
class BenchSession:
    """Models, which of them run in which engine, and how; made by `open_bench`."""

    models: tuple[Model, ...]
    settings: BenchConfig
    in_torch: Session | None
    """None: none of them."""
    in_llama_cpp: tuple[Convertible, ...]
    listeners: Listeners
    stopwatch: Stopwatch

    def measure(self) -> BenchResults:
        """Run every engine.

        Raises: MeasurementError, NonFiniteWeightsError, and what exporting a checkpoint raises.
        """
        threads = self.settings.threads or torch.get_num_threads()
        engines: list[EngineResult] = []
        if self.in_torch:
            engines.append(bench_torch(self.in_torch))
        if self.in_llama_cpp:
            engines.append(self._llama_cpp(threads))
        return BenchResults(
            settings=self.settings,
            machine=machine_facts(self.settings.device, threads),
            models=tuple(model.facts() for model in self.models),
            engines=tuple(engines),
        )

    def _llama_cpp(self, threads: int) -> EngineResult:
        generation, stopwatch = self.settings.generation, self.stopwatch
        with ExitStack() as stack:
            with stopwatch("writing GGUF files"):
                files = stack.enter_context(gguf_files(self.in_llama_cpp, self.listeners.progress))
            labelled = [
                LabelledFile(each.model.label, each.model.reference, file)
                for each, file in zip(self.in_llama_cpp, files, strict=True)
            ]
            return bench_llama_cpp(labelled, generation, threads, self.listeners, stopwatch)


def open_bench(
    models: Sequence[Model],
    settings: BenchConfig,
    engines: Sequence[Engine] | None = None,
    listeners: Listeners | None = None,
    stopwatch: Stopwatch | None = None,
) -> BenchSession:
    """Check everything that can be checked without loading a model.

    `engines` are those that were asked for, None: those that are here. Of those that were not asked for, a model stays
    out that an engine cannot run.

    Raises: OptionError, MissingPackageError, UnexportableError.
    """
    listeners, stopwatch = listeners or Listeners(), stopwatch or Stopwatch()
    compute_options(settings.device, settings.dtype)
    subjects = _for_torch(models, engines)
    with quiet_libraries(listeners.debug):
        in_llama_cpp = _for_llama_cpp(models, settings, engines, listeners.note)
    if not models[0].classifies:
        positions = {model.label: model.positions for model in models}
        generation = fit_generation(settings.generation, positions, listeners.note)
        settings = settings.model_copy(update={"generation": generation})
    in_torch = open_torch(subjects, settings, listeners, stopwatch) if subjects else None
    if in_torch:
        settings = settings.model_copy(update={"generation": in_torch.settings.generation})
    return BenchSession(tuple(models), settings, in_torch, tuple(in_llama_cpp), listeners, stopwatch)


def _for_torch(models: Sequence[Model], engines: Sequence[Engine] | None) -> list[Subject]:
    if engines is not None and "torch" not in engines:
        return []
    for model in models:
        if model.subject is None and engines is not None and "llama.cpp" not in engines:
            raise OptionError(f"{model.reference} runs in llama.cpp only; use --engine llama.cpp or --engine all.")
    return [model.subject for model in models if model.subject is not None]


def _for_llama_cpp(
    models: Sequence[Model], settings: BenchConfig, engines: Sequence[Engine] | None, note: Callable[[str], None]
) -> list[Convertible]:
    asked = engines is not None
    if engines is not None and "llama.cpp" not in engines:
        return []
    if models[0].classifies:
        if asked:
            raise OptionError(f"{models[0].label} is a classifier, which llama.cpp does not run; use --engine torch.")
        return []
    asked = asked or any(model.subject is None for model in models)
    if not asked and torch.device(settings.device).type != "cpu":
        note("llama.cpp computes on the CPU and is left out; --engine all adds it.")
        return []
    try:
        import_llama_cpp()
    except MissingPackageError as error:
        if asked:
            raise
        note(f"In torch only. {error}")
        return []
    fitting = []
    for model in models:
        try:
            fitting.append(convertible(model, settings.quantize))
        except UserError as error:
            if engines is not None:
                raise
            note(f"{model.label} is left out in llama.cpp: {error}")
    return fitting
