"""What a sweep is asked for, and everything that must be right before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pydantic import JsonValue

from spinecli.artifacts.manifest import Source, Step
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions, compute_options
from spinecli.data.config import CalibrationConfig
from spinecli.data.rows import TokenRows
from spinecli.errors import OptionError
from spinecli.evaluation.models import Subject, default_text
from spinecli.evaluation.session import Listeners, Session, open_session
from spinecli.evaluation.settings import DEFAULT_ROWS, EvaluateConfig, GenerationConfig, PerplexityConfig
from spinecli.evaluation.sweep.points import AfterCut, MethodChoice
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import PruneRequest, at_sparsity
from spinecli.pruning.request import open_request as open_prune


@dataclass(frozen=True)
class SweepConfig:
    """The options of `spine sweep`."""

    model: str
    sparsities: tuple[float, ...]
    methods: tuple[MethodChoice, ...] = (MethodChoice("spine"),)
    tune: AfterCut = AfterCut.auto
    texts: tuple[str, ...] = ()
    """To measure perplexity on; none takes the text that `spine eval` takes, of language models."""
    window: int | None = None
    """Tokens in a window of a text; None: 256, or as many as the model has positions for."""
    rows: int | None = None
    """At most so many windows; None: 40."""
    latency: bool = False
    keep: bool = False
    """Whether the points' checkpoints are part of the output."""
    round_to: int = 8
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def compute(self) -> ComputeOptions:
        """Where and in which precision; OptionError if that cannot be."""
        return compute_options(self.device, self.dtype)


@dataclass(frozen=True)
class SweepPoint:
    """One way to prune the model."""

    choice: MethodChoice
    sparsity: float

    @property
    def name(self) -> str:
        """Unique in a sweep, and fit for a directory: `spine-0.3`, `spine-adaptive-0.3`."""
        return f"{self.choice.name.replace(':', '-')}-{self.sparsity:.10g}"


@dataclass(frozen=True, eq=False)
class SweepRequest:
    """Checked options with everything opened."""

    options: SweepConfig
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
        return tuple(SweepPoint(choice, ratio) for choice in self.prunes for ratio in self.options.sparsities)

    @property
    def lineage(self) -> tuple[Step, ...]:
        """The steps that led to the model."""
        return next(iter(self.prunes.values())).lineage

    @property
    def calibration(self) -> TokenRows:
        """The calibration tokens of all runs."""
        return next(iter(self.prunes.values())).calibration

    def prune_request(self, point: SweepPoint) -> PruneRequest:
        """What `spine prune` is asked for at one point."""
        return at_sparsity(self.prunes[point.choice], point.sparsity)

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        options = self.options
        return {
            "sparsities": list(options.sparsities),
            "methods": [choice.name for choice in self.prunes],
            "tune": options.tune.value,
            "keep": options.keep,
            "round_to": options.round_to,
            "calibration_rows": options.calibration.rows,
            "calibration_length": options.calibration.length,
            "special_tokens": options.calibration.special_tokens.value,
            "dtype": options.dtype,
            # texts are inputs, known by what they say and not by what they are called
            "perplexity": self._settings(self.texts, "perplexity", {"texts"}),
            "generation": self._settings(self.speed, "generation"),
        }

    def _settings(self, session: Session | None, name: str, without: set[str] | None = None) -> JsonValue:
        if session is None:
            return None
        found: JsonValue = getattr(session.settings, name).model_dump(mode="json", exclude=without)
        return found


def open_request(
    options: SweepConfig, listeners: Listeners | None = None, stopwatch: Stopwatch | None = None
) -> SweepRequest:
    """Check the options against the checkpoint, for all methods and ratios.

    Raises: OptionError and every class of `spinecli.errors` that a checkpoint or a text can cause.
    """
    subject = Subject("dense", options.model, Checkpoint.open(resolve_checkpoint(options.model)))
    _require_language_model(options, subject)
    prunes = {choice: _open_prune(options, choice) for choice in options.methods}
    first = next(iter(prunes.values()))
    for ratio in options.sparsities:
        at_sparsity(first, ratio)
    if first.calibration.rows < 2:
        raise OptionError("A sweep needs at least 2 calibration rows, one to fit and one to judge; add rows.")
    plain = EvaluateConfig(device=options.device, dtype=options.dtype)
    texts = speed = None
    if subject.checkpoint.task is Task.causal_lm:
        read = plain.model_copy(update={"perplexity": _perplexity(options, subject)})
        texts = open_session([subject], read, listeners, stopwatch)
    if options.latency:
        timed = plain.model_copy(update={"latency": True, "generation": GenerationConfig()})
        speed = open_session([subject], timed, listeners, stopwatch)
    inputs = {"model": first.source, "calibration": first.calibration.source()}
    for index, passage in enumerate(texts.passages if texts else (), start=1):
        inputs[f"text {index}"] = TokenRows(passage.windows[0].tokens.contiguous(), passage.text).source()
    return SweepRequest(options, subject, prunes, texts, speed, inputs)


def _open_prune(options: SweepConfig, choice: MethodChoice) -> PruneRequest:
    return open_prune(
        PruneConfig(
            model=options.model,
            sparsity=options.sparsities[0],
            method=choice.method,
            widths=choice.widths,
            round_to=options.round_to,
            calibration=options.calibration,
            seed=options.seed,
            compute=options.compute,
        )
    )


def _perplexity(options: SweepConfig, subject: Subject) -> PerplexityConfig:
    return PerplexityConfig(
        texts=tuple(dict.fromkeys(options.texts)) or (default_text(subject),),
        window=options.window,
        rows=options.rows or DEFAULT_ROWS,
        special_tokens=options.calibration.special_tokens.value,
    )


def _require_language_model(options: SweepConfig, subject: Subject) -> None:
    """Refuse measures that only a causal language model has."""
    task = subject.checkpoint.task
    text = bool(options.texts or options.window or options.rows)
    for option, asked in (("--perplexity", text), ("--latency", options.latency)):
        if asked and task is not Task.causal_lm:
            raise OptionError(
                f"{option} measures language models, and {options.model} is made for {task.value}; leave it out."
            )


def with_subjects(session: Session, *subjects: Subject) -> Session:
    """The same measure of other models that read text as the dense one does."""
    return replace(session, subjects=subjects)
