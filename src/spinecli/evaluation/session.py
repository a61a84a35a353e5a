"""One evaluation, from open models to results: what can be wrong is checked first, then each measure is taken."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from transformers import PreTrainedModel

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.rows import load_tokenizer
from spinecli.calibration.stream import compute_options
from spinecli.errors import MeasurementError
from spinecli.evaluation.comparison import compare
from spinecli.evaluation.latency import fit_generation, measure_latency, random_prompt
from spinecli.evaluation.memory import measure_memory
from spinecli.evaluation.models import Subject, load_model, weights_of
from spinecli.evaluation.passages import Passage, read_passages
from spinecli.evaluation.perplexity import LoadedLogits, LogitSource, StreamedLogits, score
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.evaluation.results import Evaluation, LatencyResult, MemoryResult, ModelResult, PerplexityResult
from spinecli.evaluation.settings import DEFAULT_PROMPT_LENGTH, Settings
from spinecli.evaluation.tasks import TaskSet, find_tasks, run_tasks
from spinecli.progress import Progress, silent


def _unheard(sentence: str) -> None:
    """Drop a note."""


@dataclass(frozen=True)
class Listeners:
    """Who hears what goes on during an evaluation."""

    progress: Progress = silent
    note: Callable[[str], None] = _unheard
    debug: bool = False
    """Let third-party libraries write to the terminal."""


@dataclass(frozen=True, eq=False)
class Session:
    """Models, what to measure of them, and all that has been found for it; made by `open_session`."""

    subjects: tuple[Subject, ...]
    settings: Settings
    passages: tuple[Passage, ...]
    tasks: TaskSet | None
    listeners: Listeners
    stopwatch: Stopwatch

    def measure(self) -> Evaluation:
        """Measure everything.

        Raises: MeasurementError, NonFiniteWeightsError, OptionError (an adapter of another model).
        """
        with quiet_libraries(self.listeners.debug), _threads(self.settings.threads) as threads:
            measured = self._measure_loaded() if self._needs_loading else self._measure_streamed()
            # after the loaded models are gone: the probes need their room
            memories = self._memories()
        models = tuple(
            result.model_copy(update={"memory": memory}) for result, memory in zip(measured, memories, strict=True)
        )
        return Evaluation(
            settings=self.settings,
            machine=_machine(self.settings.device, threads),
            models=models,
            comparison=compare(models),
        )

    @property
    def _needs_loading(self) -> bool:
        """Perplexity alone goes block by block; an adapter only exists on a loaded model."""
        adapted = any(subject.adapter for subject in self.subjects)
        return bool(self.settings.latency or self.tasks or (self.passages and adapted))

    def _measure_streamed(self) -> list[ModelResult]:
        compute = compute_options(self.settings.device, self.settings.dtype)
        return [
            _result(subject, perplexity=self._perplexities(index, StreamedLogits(subject.checkpoint, compute)))
            for index, subject in enumerate(self.subjects)
        ]

    def _measure_loaded(self) -> list[ModelResult]:
        models = self._load_all()
        latencies = self._latencies(models)
        return [
            _result(
                subject,
                perplexity=self._perplexities(index, LoadedLogits(model, self.settings.device)),
                latency=latencies[index],
                lm_eval=self._task_results(subject, model),
            )
            for index, (subject, model) in enumerate(zip(self.subjects, models, strict=True))
        ]

    def _load_all(self) -> list[PreTrainedModel]:
        models = []
        with self.stopwatch("loading"):
            for subject in self.subjects:
                models.append(load_model(subject, device=self.settings.device, dtype=self.settings.dtype))
                self.listeners.progress("loading models", len(models), len(self.subjects))
        return models

    def _perplexities(self, index: int, source: LogitSource) -> tuple[PerplexityResult, ...]:
        return tuple(self._perplexity(index, passage, source) for passage in self.passages)

    def _perplexity(self, index: int, passage: Passage, source: LogitSource) -> PerplexityResult:
        windows, windowing = passage.windows[index], passage.windowing
        try:
            with self.stopwatch("perplexity"):
                found = score(source(windows, self.listeners.progress), windows, windowing)
        except MeasurementError as error:
            raise MeasurementError(f"{self.subjects[index].label} on {passage.text.description}: {error}") from error
        return PerplexityResult(
            text=passage.text.reference,
            description=passage.text.description,
            perplexity=found.perplexity,
            nll=found.nll,
            scored_tokens=found.tokens,
            windows=len(windows),
            window=windowing.window,
            stride=windowing.stride,
            computed_by=source.name,
            comparable=passage.comparable(index),
        )

    def _latencies(self, models: Sequence[PreTrainedModel]) -> Sequence[LatencyResult | None]:
        settings = self.settings
        if not settings.latency:
            return [None] * len(models)
        generation = settings.generation
        length = generation.prompt_length or DEFAULT_PROMPT_LENGTH
        prompts = [
            random_prompt(subject.vocabulary, length, generation.batch_size).to(settings.device)
            for subject in self.subjects
        ]
        with self.stopwatch("latency"):
            return measure_latency(models, prompts, generation, self.listeners.progress)

    def _task_results(self, subject: Subject, model: PreTrainedModel) -> dict[str, JsonValue] | None:
        if self.tasks is None:
            return None
        tokenizer = load_tokenizer(subject.path)
        with self.stopwatch("tasks"):
            return run_tasks(self.tasks, model, tokenizer, self.listeners.progress, debug=self.listeners.debug)

    def _memories(self) -> list[MemoryResult | None]:
        if not self.settings.memory:
            return [None] * len(self.subjects)
        results: list[MemoryResult | None] = []
        with self.stopwatch("memory"):
            for subject in self.subjects:
                results.append(measure_memory(subject, self.settings))
                self.listeners.progress("memory", len(results), len(self.subjects))
        return results


def open_session(
    subjects: Sequence[Subject],
    settings: Settings,
    listeners: Listeners | None = None,
    stopwatch: Stopwatch | None = None,
) -> Session:
    """Check the settings against the models, read the texts and find the tasks; nothing is measured.

    Raises: OptionError, and every UserError that a device, text, tokenizer or task can cause.
    """
    listeners, stopwatch = listeners or Listeners(), stopwatch or Stopwatch()
    compute_options(settings.device, settings.dtype)
    if settings.latency or settings.memory:
        positions = {subject.label: subject.positions for subject in subjects}
        generation = fit_generation(settings.generation, positions, listeners.note)
        settings = settings.model_copy(update={"generation": generation})
    with quiet_libraries(listeners.debug), stopwatch("preparing"):
        passages = read_passages(settings.perplexity, subjects, listeners.note) if settings.perplexity else []
        tasks = find_tasks(settings.tasks, listeners.progress, debug=listeners.debug) if settings.tasks else None
    return Session(tuple(subjects), settings, tuple(passages), tasks, listeners, stopwatch)


def evaluate_models(subjects: Sequence[Subject], settings: Settings, listeners: Listeners | None = None) -> Evaluation:
    """Measure models side by side; the first is the reference of the ratios."""
    return open_session(subjects, settings, listeners).measure()


def _result(
    subject: Subject,
    *,
    perplexity: tuple[PerplexityResult, ...],
    latency: LatencyResult | None = None,
    lm_eval: dict[str, JsonValue] | None = None,
) -> ModelResult:
    return ModelResult(
        label=subject.label,
        reference=subject.reference,
        adapter=str(subject.adapter) if subject.adapter else None,
        weights=weights_of(subject),
        perplexity=perplexity,
        latency=latency,
        lm_eval=lm_eval,
    )


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Torch's thread count inside, the previous one outside."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _machine(device: str, threads: int) -> dict[str, JsonValue]:
    """Where the figures come from, without naming the host."""
    accelerator = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "accelerator": accelerator,
        "torch": torch.__version__,
    }
