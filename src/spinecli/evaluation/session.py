"""One evaluation, from open models to results: what can be wrong is checked first, then each measure is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue
from transformers import PreTrainedModel

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.stream.block_stream import compute_options
from spinecli.errors import MeasurementError
from spinecli.evaluation.classification import classify
from spinecli.evaluation.comparison import compare
from spinecli.evaluation.config import EvaluateConfig
from spinecli.evaluation.continuations import continuations, prompts_for
from spinecli.evaluation.labelled import LabelledSet, read_labelled
from spinecli.evaluation.latency import measure_forward, measure_latency, random_prompt
from spinecli.evaluation.lengths import fit_generation, fit_pass
from spinecli.evaluation.machine import machine_facts, torch_threads
from spinecli.evaluation.measures import check_measures, require_measurable, with_some_measure
from spinecli.evaluation.memory import measure_memory
from spinecli.evaluation.models import (
    Subject,
    cut_of,
    default_text,
    dense_reference,
    load_model,
    open_subjects,
    weights_of,
)
from spinecli.evaluation.perplexity import LoadedLogits, LogitSource, Passage, StreamedLogits, read_passages, score
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
from spinecli.evaluation.tasks import TaskSet, find_tasks, run_tasks
from spinecli.healing.curve import curve_of


@dataclass(frozen=True, eq=False)
class Session:
    """Models, what to measure of them, and all that has been found for it; made by `open_session`."""

    asked: EvaluateConfig
    config: EvaluateConfig
    """With the measures and lengths filled in that depend on the models."""
    subjects: tuple[Subject, ...]
    passages: tuple[Passage, ...]
    tasks: TaskSet | None
    labelled: LabelledSet | None
    context: RunContext

    def measure(self) -> Evaluation:
        """Measure everything.

        Raises: MeasurementError, NonFiniteWeightsError, OptionError (an adapter of another model).
        """
        with quiet_libraries(self.context.debug), torch_threads(self.config.threads) as threads:
            measured = self._measure_loaded() if self._needs_loading else self._measure_streamed()
            # after the loaded models are gone: the probes need their room
            memories = self._memories()
        models = tuple(
            result.model_copy(update={"memory": memory}) for result, memory in zip(measured, memories, strict=True)
        )
        return Evaluation(
            settings=self.config,
            machine=machine_facts(self.config.device, threads),
            models=models,
            comparison=compare(models),
        )

    @property
    def _needs_loading(self) -> bool:
        """Perplexity alone goes block by block; an adapter only exists on a loaded model."""
        adapted = any(subject.adapter for subject in self.subjects)
        return bool(self.config.latency or self.tasks or self.labelled or (self.passages and adapted))

    def _measure_streamed(self) -> list[ModelResult]:
        compute = compute_options(self.config.device, self.config.dtype)
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
                perplexity=self._perplexities(index, LoadedLogits(model, self.config.device)),
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
        with self.context.stopwatch("loading"):
            for subject in self.subjects:
                models.append(load_model(subject, device=self.config.device, dtype=self.config.dtype))
                self.context.progress("loading models", len(models), len(self.subjects))
        return models

    def _perplexities(self, index: int, source: LogitSource) -> tuple[PerplexityResult, ...]:
        return tuple(self._perplexity(index, passage, source) for passage in self.passages)

    def _perplexity(self, index: int, passage: Passage, source: LogitSource) -> PerplexityResult:
        windows = passage.windows[index]
        tokens, windowing = windows.tokens, windows.windowing
        try:
            with self.context.stopwatch("perplexity"):
                found = score(source(tokens, self.context), tokens, windowing)
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
            with self.context.stopwatch("labelled examples"):
                return classify(self.labelled, index, model, self.config.device, self.context)
        except MeasurementError as error:
            where = f"{self.subjects[index].label} on {self.labelled.description}"
            raise MeasurementError(f"{where}: {error}") from error

    def _speeds(self, models: Sequence[PreTrainedModel]) -> Sequence[LatencyResult | ForwardResult | None]:
        config, generation = self.config, self.config.generation
        if not config.latency:
            return [None] * len(models)
        length, batch = generation.length, generation.batch_size
        prompts = [
            random_prompt(subject.vocabulary, length, batch, subject.opening).to(config.device)
            for subject in self.subjects
        ]
        measure = measure_forward if self.subjects[0].classifies else measure_latency
        with self.context.stopwatch("latency"):
            return measure(models, prompts, generation, self.context)

    def _task_results(self, subject: Subject, model: PreTrainedModel) -> dict[str, JsonValue] | None:
        if self.tasks is None:
            return None
        tokenizer = subject.tokenizer
        with self.context.stopwatch("tasks"):
            return run_tasks(self.tasks, model, tokenizer, self.context)

    def _memories(self) -> list[MemoryResult | None]:
        if not self.config.memory:
            return [None] * len(self.subjects)
        results: list[MemoryResult | None] = []
        with self.context.stopwatch("memory"):
            for subject in self.subjects:
                results.append(measure_memory(subject, self.config))
                self.context.progress("memory", len(results), len(self.subjects))
        return results


def open_session(config: EvaluateConfig, context: RunContext | None = None) -> Session:
    """Open the models and check what is asked of them; nothing is measured. Where no measure is named, some are.

    Raises: OptionError, and every UserError that a model, device, text, data set, tokenizer or task can cause.
    """
    context = context or RunContext()
    check_measures(config)
    subjects = open_subjects([*((other, None) for other in config.against), (config.model, config.adapter)])
    last = subjects[-1]
    some = with_some_measure(config, None if last.classifies else default_text(last))
    if not config.names_a_measure and last.classifies:
        context.note("No measure was named: speed only; --labelled DATA would measure accuracy and loss.")
    elif not config.names_a_measure:
        context.note(f"No measure was named: perplexity on {some.texts[0]}, and speed.")
    if not config.against and (dense := dense_reference(last)):
        context.note(f"--against {dense} would compare with the checkpoint that {last.label} was made from.")
    return replace(open_measures(subjects, some, context), asked=config)


def open_measures(subjects: Sequence[Subject], config: EvaluateConfig, context: RunContext | None = None) -> Session:
    """Check measures against models that are open already; read texts and examples and find the tasks.

    Raises: OptionError, and every UserError that a device, text, data set, tokenizer or task can cause.
    """
    context, asked = context or RunContext(), config
    compute_options(config.device, config.dtype)
    for subject in subjects:
        require_measurable(subject, config)
    if config.latency or config.memory:
        fit = fit_pass if subjects[0].classifies else fit_generation
        positions = {subject.label: subject.positions for subject in subjects}
        fitted = fit(config.generation, positions, context.note)
        config = config.model_copy(update={"generation": fitted})
    with quiet_libraries(context.debug), context.stopwatch("preparing"):
        passages = read_passages(config.perplexity, subjects, context.note) if config.perplexity else []
        tasks = find_tasks(config.tasks, context) if config.tasks else None
        labelled = read_labelled(config.labelled, subjects, context.note) if config.labelled else None
    if labelled is not None:
        config = config.model_copy(update={"labelled": labelled.config})
    return Session(asked, config, tuple(subjects), tuple(passages), tasks, labelled, context)


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
        healing=curve_of(subject.path),
        perplexity=perplexity,
        lm_eval=lm_eval,
    )
