"""What a sweep is asked for, and everything that must be right before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import JsonValue

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.manifest import Source, Step
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.calibration import Calibration
from spinecli.data.rows import TokenRows, tokens_source
from spinecli.errors import OptionError
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig, TextConfig
from spinecli.evaluation.models import Subject, default_text
from spinecli.evaluation.session import Session, open_measures
from spinecli.evaluation.sweep.config import SweepConfig
from spinecli.evaluation.sweep.points import MethodChoice, SweepPoint, read_methods
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import PruneRequest, at_sparsity
from spinecli.pruning.request import open_request as open_prune


@dataclass(frozen=True, eq=False)
class SweepRequest:
    """A checked config with everything opened."""

    config: SweepConfig
    subject: Subject
    """The dense model."""
    prunes: Mapping[MethodChoice, PruneRequest]
    """By method, at the first ratio."""
    texts: Session | None
    """Measures perplexity; None if that is not measured."""
    speed: Session | None
    """Measures latency; None if that is not measured."""
    inputs: dict[str, Source]

    @property
    def points(self) -> tuple[SweepPoint, ...]:
        """All ways to prune, method by method."""
        return tuple(SweepPoint(choice, ratio) for choice in self.prunes for ratio in self.config.sparsities)

    @property
    def compute(self) -> ComputeOptions:
        """Where and in which precision all runs compute."""
        return next(iter(self.prunes.values())).compute

    @property
    def lineage(self) -> tuple[Step, ...]:
        """The steps that led to the model."""
        return next(iter(self.prunes.values())).lineage

    @property
    def calibration(self) -> Calibration:
        """What all runs calibrate on."""
        return next(iter(self.prunes.values())).calibration

    def settled(self, rows: TokenRows) -> SweepRequest:
        """The same when what `calibration` gives is there, so that no run makes it again."""
        calibration = self.calibration.settled(rows)
        return replace(
            self, prunes={choice: replace(prune, calibration=calibration) for choice, prune in self.prunes.items()}
        )

    def prune_request(self, point: SweepPoint) -> PruneRequest:
        """What `spine prune` is asked for at one point."""
        return at_sparsity(self.prunes[point.choice], point.sparsity)

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        generation = self.speed.config.generation.model_dump(mode="json") if self.speed else None
        return {
            **self.config.parameters(),
            "sparsity": list(self.config.sparsities),
            "methods": [choice.name for choice in self.prunes],
            "generation": generation,
        }


def open_request(config: SweepConfig, context: RunContext | None = None) -> SweepRequest:
    """Check what is asked for against the checkpoint, for all methods and ratios.

    Raises: OptionError and every class of `spinecli.errors` that a checkpoint or a text can cause.
    """
    methods = read_methods(config.methods)
    subject = Subject("dense", config.model, Checkpoint.open(resolve_checkpoint(config.model)))
    _require_language_model(config, subject)
    prunes = {choice: open_prune(_prune_config(config, choice)) for choice in methods}
    first = next(iter(prunes.values()))
    if first.calibration.rows < 2:
        raise OptionError("A sweep needs at least 2 calibration rows, one to fit and one to hold out; add rows.")
    plain = EvaluateConfig(model=config.model, device=config.device, dtype=config.dtype)
    texts = speed = None
    if subject.checkpoint.task is Task.causal_lm:
        read = plain.model_copy(update={"perplexity": _perplexity(config, subject)})
        texts = open_measures([subject], read, context)
    if config.latency:
        timed = plain.model_copy(update={"latency": True})
        speed = open_measures([subject], timed, context)
    inputs = {"model": first.source, "calibration": first.calibration.source()}
    for index, passage in enumerate(texts.passages if texts else (), start=1):
        inputs[f"text {index}"] = tokens_source(passage.text.reference, passage.windows[0].tokens)
    return SweepRequest(config, subject, prunes, texts, speed, inputs)


def _prune_config(config: SweepConfig, choice: MethodChoice) -> PruneConfig:
    """What `spine prune` would be asked for at the first ratio."""
    return PruneConfig(
        model=config.model,
        sparsity=config.sparsities[0],
        method=choice.method,
        widths=choice.widths,
        round_to=config.round_to,
        calibration=config.calibration,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
    )


def _perplexity(config: SweepConfig, subject: Subject) -> PerplexityConfig:
    asked = config.perplexity
    return PerplexityConfig(
        texts=tuple(dict.fromkeys(asked.texts)) or (default_text(subject),),
        window=asked.window,
        rows=asked.rows,
        special_tokens=config.calibration.special_tokens,
    )


def _require_language_model(config: SweepConfig, subject: Subject) -> None:
    """Refuse what only a causal language model has."""
    task = subject.checkpoint.task
    asked_for = {
        "--perplexity": config.perplexity != TextConfig(),
        "--latency": config.latency,
        "--heal-tokens": config.heal_tokens > 0,
    }
    for option, asked in asked_for.items():
        if asked and task is not Task.causal_lm:
            raise OptionError(
                f"{option} is for language models, and {config.model} is made for {task.value}; leave it out."
            )


def with_subjects(session: Session, *subjects: Subject) -> Session:
    """The same measure of other models that read text as the dense one does."""
    return replace(session, subjects=subjects)
