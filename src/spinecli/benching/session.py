"""One benchmark, from open models to results: what can be wrong is checked first, then engine after engine runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.benching.conversion import Convertible, convertible, gguf_files
from spinecli.benching.llama_cpp_engine import LabelledFile, bench_llama_cpp
from spinecli.benching.llama_cpp_model import import_llama_cpp
from spinecli.benching.models import Model
from spinecli.benching.results import BenchResults, EngineResult
from spinecli.benching.settings import BenchSettings, Engine
from spinecli.benching.torch_engine import bench_torch, open_torch
from spinecli.calibration.stream import compute_options
from spinecli.errors import MissingPackageError, OptionError, UserError
from spinecli.evaluation.latency import fit_generation
from spinecli.evaluation.machine import machine_facts
from spinecli.evaluation.models import Subject
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.evaluation.session import Listeners, Session


@dataclass(frozen=True, eq=False)
class Bench:
    """Models, which of them run in which engine, and how; made by `open_bench`."""

    models: tuple[Model, ...]
    settings: BenchSettings
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
    settings: BenchSettings,
    engines: Sequence[Engine] | None = None,
    listeners: Listeners | None = None,
    stopwatch: Stopwatch | None = None,
) -> Bench:
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
    return Bench(tuple(models), settings, in_torch, tuple(in_llama_cpp), listeners, stopwatch)


def _for_torch(models: Sequence[Model], engines: Sequence[Engine] | None) -> list[Subject]:
    if engines is not None and "torch" not in engines:
        return []
    for model in models:
        if model.subject is None and engines is not None and "llama.cpp" not in engines:
            raise OptionError(f"{model.reference} runs in llama.cpp only; use --engine llama.cpp or --engine all.")
    return [model.subject for model in models if model.subject is not None]


def _for_llama_cpp(
    models: Sequence[Model], settings: BenchSettings, engines: Sequence[Engine] | None, note: Callable[[str], None]
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
