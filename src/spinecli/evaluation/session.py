"""One evaluation, from open models to results: what can be wrong is checked first, then each measure is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from transformers import PreTrainedModel

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.stream.block_stream import compute_options
from spinecli.errors import MeasurementError, OptionError
from spinecli.evaluation.classification import classify
from spinecli.evaluation.comparison import compare
from spinecli.evaluation.continuations import continuations, prompts_for
from spinecli.evaluation.labelled import LabelledSet, read_labelled
from spinecli.evaluation.latency import fit_generation, measure_forward, measure_latency, random_prompt
from spinecli.evaluation.machine import machine_facts, torch_threads
from spinecli.evaluation.memory import measure_memory
from spinecli.evaluation.models import Subject, cut_of, load_model, weights_of
from spinecli.evaluation.passages import Passage, read_passages
from spinecli.evaluation.perplexity import LoadedLogits, LogitSource, StreamedLogits, score
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.evaluation.results import (
    ClassificationResult,
    Evaluation,
    ForwardResult,
    LatencyResult,
    MemoryResult,
    ModelResult,
    PerplexityResult,
)
from spinecli.evaluation.settings import DEFAULT_PROMPT_LENGTH, EvaluateConfig, GenerationConfig, fit_row_length
from spinecli.evaluation.tasks import TaskSet, find_tasks, run_tasks
from spinecli.progress import Progress, silent


def require_measurable(subject: Subject, settings: EvaluateConfig) -> None:
    """Refuse a measure that the model's kind does not have; all models of an evaluation are of one kind.

    Raises: OptionError.
    """
    for option, asked, of_classifiers in (
        ("--perplexity", settings.perplexity, False),
        ("--tasks", settings.tasks, False),
        ("--labelled", settings.labelled, True),
    ):
        if asked is None or subject.classifies == of_classifiers:
            continue
        if of_classifiers:
            raise OptionError(
                f"{option} measures classifiers and {subject.label} is a language model; use --perplexity or --tasks."
            )
        raise OptionError(
            f"{option} measures language models and {subject.label} is a classifier; use --labelled with examples."
        )


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
    settings: EvaluateConfig
    passages: tuple[Passage, ...]
    tasks: TaskSet | None
    labelled: LabelledSet | None
    listeners: Listeners
    stopwatch: Stopwatch

    def measure(self) -> Evaluation:
        """Measure everything.

        Raises: MeasurementError, NonFiniteWeightsError, OptionError (an adapter of another model).
        """
        with quiet_libraries(self.listeners.debug), torch_threads(self.settings.threads) as threads:
            measured = self._measure_loaded() if self._needs_loading else self._measure_streamed()
            # after the loaded models are gone: the probes need their room
            memories = self._memories()
        models = tuple(
            result.model_copy(update={"memory": memory}) for result, memory in zip(measured, memories, strict=True)
        )
        return Evaluation(
            settings=self.settings,
            machine=machine_facts(self.settings.device, threads),
            models=models,
            comparison=compare(models),
        )

    @property
    def _needs_loading(self) -> bool:
        """Perplexity alone goes block by block; an adapter only exists on a loaded model."""
        adapted = any(subject.adapter for subject in self.subjects)
        return bool(self.settings.latency or self.tasks or self.labelled or (self.passages and adapted))

    def _measure_streamed(self) -> list[ModelResult]:
        compute = compute_options(self.settings.device, self.settings.dtype)
        return [
            _result(subject, perplexity=self._perplexities(index, StreamedLogits(subject.checkpoint, compute)))
            for index, subject in enumerate(self.subjects)
        ]

    def _measure_loaded(self) -> list[ModelResult]:
        models = self._load_all()
        speeds = self._speeds(models)
        prompts = prompts_for(self.subjects[-1])
        results = []
        for index, (subject, model, speed) in enumerate(zip(self.subjects, models, speeds, strict=True)):
            found = _result(
                subject,
                perplexity=self._perplexities(index, LoadedLogits(model, self.settings.device)),
                lm_eval=self._task_results(subject, model),
            )
            update = {
                "classification": self._classification(index, model),
                "continuations": continuations(subject, model, prompts),
                "forward" if subject.classifies else "latency": speed,
            }
            results.append(found.model_copy(update=update))
        return results

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
        windows = passage.windows[index]
        tokens, windowing = windows.tokens, windows.windowing
        try:
            with self.stopwatch("perplexity"):
                found = score(source(tokens, self.listeners.progress), tokens, windowing)
        except MeasurementError as error:
            raise MeasurementError(f"{self.subjects[index].label} on {passage.text.description}: {error}") from error
        return PerplexityResult(
            text=passage.text.reference,
            description=passage.text.description,
            perplexity=found.perplexity,
            nll=found.nll,
            scored_tokens=found.tokens,
            windows=len(tokens),
            window=windowing.window,
            stride=windowing.stride,
            opened_by="".join(windows.frame.names),
            computed_by=source.name,
            comparable=passage.comparable(index),
        )

    def _classification(self, index: int, model: PreTrainedModel) -> ClassificationResult | None:
        if self.labelled is None:
            return None
        try:
            with self.stopwatch("labelled examples"):
                return classify(self.labelled, index, model, self.settings.device, self.listeners.progress)
        except MeasurementError as error:
            where = f"{self.subjects[index].label} on {self.labelled.description}"
            raise MeasurementError(f"{where}: {error}") from error

    def _speeds(self, models: Sequence[PreTrainedModel]) -> Sequence[LatencyResult | ForwardResult | None]:
        settings = self.settings
        if not settings.latency:
            return [None] * len(models)
        generation = settings.generation
        length = generation.prompt_length or DEFAULT_PROMPT_LENGTH
        prompts = [
            random_prompt(subject.vocabulary, length, generation.batch_size, subject.opening).to(settings.device)
            for subject in self.subjects
        ]
        measure = measure_forward if self.subjects[0].classifies else measure_latency
        with self.stopwatch("latency"):
            return measure(models, prompts, generation, self.listeners.progress)

    def _task_results(self, subject: Subject, model: PreTrainedModel) -> dict[str, JsonValue] | None:
        if self.tasks is None:
            return None
        tokenizer = subject.tokenizer
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
    settings: EvaluateConfig,
    listeners: Listeners | None = None,
    stopwatch: Stopwatch | None = None,
) -> Session:
    """Check the settings against the models, read texts and examples and find the tasks; nothing is measured.

    Raises: OptionError, and every UserError that a device, text, data set, tokenizer or task can cause.
    """
    listeners, stopwatch = listeners or Listeners(), stopwatch or Stopwatch()
    compute_options(settings.device, settings.dtype)
    for subject in subjects:
        require_measurable(subject, settings)
    if settings.latency or settings.memory:
        settings = settings.model_copy(update={"generation": _fit(settings.generation, subjects, listeners.note)})
    with quiet_libraries(listeners.debug), stopwatch("preparing"):
        passages = read_passages(settings.perplexity, subjects, listeners.note) if settings.perplexity else []
        tasks = find_tasks(settings.tasks, listeners.progress, debug=listeners.debug) if settings.tasks else None
        labelled = read_labelled(settings.labelled, subjects, listeners.note) if settings.labelled else None
    if labelled is not None:
        settings = settings.model_copy(update={"labelled": labelled.settings})
    return Session(tuple(subjects), settings, tuple(passages), tasks, labelled, listeners, stopwatch)


def _fit(generation: GenerationConfig, subjects: Sequence[Subject], note: Callable[[str], None]) -> GenerationConfig:
    """The generation, or a classifier's pass, in the length that every model has room for."""
    positions = {subject.label: subject.positions for subject in subjects}
    if not subjects[0].classifies:
        return fit_generation(generation, positions, note)
    asked = generation.prompt_length
    length = fit_row_length(asked, DEFAULT_PROMPT_LENGTH, positions, "--prompt-length", note)
    return generation.model_copy(update={"prompt_length": length, "new_tokens": 0})


def evaluate_models(
    subjects: Sequence[Subject], settings: EvaluateConfig, listeners: Listeners | None = None
) -> Evaluation:
    """Measure models side by side; the first is the reference of the ratios."""
    return open_session(subjects, settings, listeners).measure()


def _result(
    subject: Subject,
    *,
    perplexity: tuple[PerplexityResult, ...],
    lm_eval: dict[str, JsonValue] | None = None,
) -> ModelResult:
    return ModelResult(
        label=subject.label,
        reference=subject.reference,
        adapter=str(subject.adapter) if subject.adapter else None,
        weights=weights_of(subject),
        cut=cut_of(subject),
        perplexity=perplexity,
        lm_eval=lm_eval,
    )
