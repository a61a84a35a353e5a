"""One benchmark, from open models to results: what can be wrong is checked first, then engine after engine runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.stream.block_stream import compute_options
from spinecli.errors import MissingPackageError, OptionError, UserError
from spinecli.evaluation.bench.config import BenchConfig
from spinecli.evaluation.bench.cost import checkpoint_cost, compared, spread
from spinecli.evaluation.bench.llama_cpp_engine import LabelledFile, bench_llama_cpp, import_llama_cpp
from spinecli.evaluation.bench.models import Convertible, Model, convertible, gguf_files, open_models
from spinecli.evaluation.bench.results import BenchResults, EngineResult, EngineRun, PromisedWork
from spinecli.evaluation.config import EvaluateConfig, GenerationConfig
from spinecli.evaluation.lengths import fit_generation
from spinecli.evaluation.machine import machine_facts
from spinecli.evaluation.models import Subject, weights_of
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.evaluation.results import ModelResult
from spinecli.evaluation.session import Session, open_measures


def open_torch(subjects: Sequence[Subject], config: BenchConfig, context: RunContext) -> Session:
    """Check device, kinds and lengths; nothing is loaded. Raises: OptionError."""
    *others, last = (subject.reference for subject in subjects)
    measures = EvaluateConfig(
        model=last,
        against=tuple(others),
        latency=True,
        memory=True,
        generation=config.generation,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
    )
    return open_measures(subjects, measures, context)


def bench_torch(session: Session) -> EngineResult:
    """Time all models in turns, all of them in memory, then measure each in a fresh process.

    Raises: MeasurementError, NonFiniteWeightsError.
    """
    config, evaluation = session.config, session.measure()
    runs = [
        _run(subject, result, config.generation, config.dtype)
        for subject, result in zip(session.subjects, evaluation.models, strict=True)
    ]
    return EngineResult(engine="torch", version=torch.__version__, runs=compared(runs))


def _run(subject: Subject, result: ModelResult, generation: GenerationConfig, dtype: str) -> EngineRun:
    length, batch = generation.length, generation.batch_size
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

    asked: BenchConfig
    config: BenchConfig
    """With the lengths filled in that every model has room for."""
    models: tuple[Model, ...]
    in_torch: Session | None
    """None: none of them."""
    in_llama_cpp: tuple[Convertible, ...]
    context: RunContext

    def measure(self) -> BenchResults:
        """Run every engine.

        Raises: MeasurementError, NonFiniteWeightsError, and what exporting a checkpoint raises.
        """
        threads = self.config.threads or torch.get_num_threads()
        engines: list[EngineResult] = []
        if self.in_torch:
            engines.append(bench_torch(self.in_torch))
        if self.in_llama_cpp:
            engines.append(self._llama_cpp(threads))
        return BenchResults(
            settings=self.config,
            machine=machine_facts(self.config.device, threads),
            models=tuple(model.facts() for model in self.models),
            engines=tuple(engines),
        )

    def _llama_cpp(self, threads: int) -> EngineResult:
        generation, context = self.config.generation, self.context
        with ExitStack() as stack:
            with context.stopwatch("writing GGUF files"):
                files = stack.enter_context(gguf_files(self.in_llama_cpp, context))
            labelled = [
                LabelledFile(each.model.label, each.model.reference, file)
                for each, file in zip(self.in_llama_cpp, files, strict=True)
            ]
            return bench_llama_cpp(labelled, generation, threads, context)


def open_bench(config: BenchConfig, context: RunContext | None = None) -> BenchSession:
    """Open the models and check everything that can be checked without loading one.

    Of engines that were not asked for, a model stays out that an engine cannot run.

    Raises: OptionError, MissingPackageError, UnexportableError, and what `open_models` raises.
    """
    context, asked = context or RunContext(), config
    models = open_models(config.models)
    compute_options(config.device, config.dtype)
    subjects = _for_torch(models, config)
    with quiet_libraries(context.debug):
        in_llama_cpp = _for_llama_cpp(models, config, context.note)
    if not models[0].classifies:
        positions = {model.label: model.positions for model in models}
        fitted = fit_generation(config.generation, positions, context.note)
        config = config.model_copy(update={"generation": fitted})
    in_torch = open_torch(subjects, config, context) if subjects else None
    if in_torch:
        config = config.model_copy(update={"generation": in_torch.config.generation})
    return BenchSession(asked, config, tuple(models), in_torch, tuple(in_llama_cpp), context)


def _for_torch(models: Sequence[Model], config: BenchConfig) -> list[Subject]:
    if config.engine == "llama.cpp":
        return []
    for model in models:
        if model.subject is None and config.engine == "torch":
            raise OptionError(f"{model.reference} runs in llama.cpp only; use --engine llama.cpp or --engine all.")
    return [model.subject for model in models if model.subject is not None]


def _for_llama_cpp(models: Sequence[Model], config: BenchConfig, note: Callable[[str], None]) -> list[Convertible]:
    if config.engine == "torch":
        return []
    asked = config.engine is not None
    if models[0].classifies:
        if asked:
            raise OptionError(f"{models[0].label} is a classifier, which llama.cpp does not run; use --engine torch.")
        return []
    needed = asked or any(model.subject is None for model in models)
    if not needed and torch.device(config.device).type != "cpu":
        note("llama.cpp computes on the CPU and is left out; --engine all adds it.")
        return []
    try:
        import_llama_cpp()
    except MissingPackageError as error:
        if needed:
            raise
        note(f"In torch only. {error}")
        return []
    fitting = []
    for model in models:
        try:
            fitting.append(convertible(model, config.quantize))
        except UserError as error:
            if asked:
                raise
            note(f"{model.label} is left out in llama.cpp: {error}")
    return fitting
