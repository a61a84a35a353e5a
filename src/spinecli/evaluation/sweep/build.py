"""The points of a sweep, built one after the other, and what is measured of each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.whole_file import whole_file
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream, ComputeOptions
from spinecli.checkpoints.stream.objective import Objective, objective_of
from spinecli.evaluation.latency import paired_ratio
from spinecli.evaluation.models import Subject, weights_of
from spinecli.evaluation.results import LatencyResult
from spinecli.evaluation.sweep.points import SweepPoint
from spinecli.evaluation.sweep.request import SweepRequest, with_subjects
from spinecli.evaluation.sweep.results import Refusal, Speed, SweepRow
from spinecli.healing.config import HealConfig, HealText
from spinecli.healing.request import open_request as open_heal
from spinecli.healing.run import heal
from spinecli.pruning.config import TuneConfig, TuneMethod
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.run import prune

_EITHER: TypeAdapter[SweepRow | Refusal] = TypeAdapter(SweepRow | Refusal)


@dataclass(frozen=True)
class ResultCache:
    """Files of figures by the models' names."""

    directory: Path

    def recorded(self, name: str, find: Callable[[], SweepRow | Refusal]) -> SweepRow | Refusal:
        """What is recorded under `name`; if nothing is, what `find` finds, which is recorded first."""
        path = self.directory / f"{name}.json"
        if path.is_file():
            return _EITHER.validate_json(path.read_bytes())
        found = find()
        self.directory.mkdir(exist_ok=True)
        with whole_file(path) as part:
            part.write_text(found.model_dump_json(), encoding="utf-8")
        return found


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The rows, and what the dense model makes of them."""

    objective: Objective
    tokens: Tensor
    """(rows, length)."""
    dense: Tensor
    """(rows, length, d_model): the dense model's hidden states behind its last block."""
    compute: ComputeOptions
    context: RunContext
    opening: int
    """Special tokens in front of every row."""

    def measure(self, checkpoint: Checkpoint) -> float:
        """The objective of a checkpoint with the dense one's vocabulary and width; the lower the better."""
        stream = BlockStream(checkpoint, self.tokens.shape[1], self.compute, self.context, self.opening)
        with self.context.stopwatch("computing"):
            found = self.objective.measure(stream, {"model": stream.forward(self.tokens)}, self.dense)
        return float(found["model"].mean())


def hold_out(
    dense: Checkpoint, tokens: Tensor, compute: ComputeOptions, context: RunContext, opening: int = 0
) -> HeldOut:
    """Run the dense model on the rows: tokens (rows, length), the first `opening` of each row special ones."""
    stream = BlockStream(dense, tokens.shape[1], compute, context)
    with context.stopwatch("computing"):
        return HeldOut(objective_of(dense), tokens, stream.forward(tokens), compute, context, opening)


@dataclass(frozen=True)
class Label:
    """What a row is called, and how its model was made."""

    name: str
    method: str | None = None
    tuned: str | None = None
    sparsity: float = 0.0
    achieved_sparsity: float = 0.0
    removed_blocks: int = 0


def measure(request: SweepRequest, subject: Subject, label: Label, held_out: HeldOut) -> SweepRow:
    """Measure a model; its speed beside the dense one, in turns.

    Raises: MeasurementError.
    """
    weights = weights_of(subject)
    return SweepRow(
        name=label.name,
        method=label.method,
        tuned=label.tuned,
        sparsity=label.sparsity,
        achieved_sparsity=label.achieved_sparsity,
        removed_blocks=label.removed_blocks,
        parameters=weights.parameters,
        block_parameters=weights.block_parameters,
        bytes=weights.bytes_on_disk,
        flops_per_token=weights.flops_per_token,
        held_out=held_out.measure(subject.checkpoint),
        perplexity=_perplexities(request, subject),
        speed=_speed(request, subject),
    )


def _perplexities(request: SweepRequest, subject: Subject) -> dict[str, float]:
    if request.texts is None:
        return {}
    (found,) = with_subjects(request.texts, subject).measure().models
    return {text.text: text.perplexity for text in found.perplexity}


def _speed(request: SweepRequest, subject: Subject) -> Speed | None:
    if request.speed is None:
        return None
    subjects = (request.subject,) if subject is request.subject else (request.subject, subject)
    models = with_subjects(request.speed, *subjects).measure().models
    dense, found = models[0].latency, models[-1].latency
    return _compared(found, dense) if found and dense else None


def _compared(found: LatencyResult, dense: LatencyResult) -> Speed:
    return Speed(
        prefill=found.prefill.median,
        decode=found.decode.median,
        dense_prefill=dense.prefill.median,
        dense_decode=dense.decode.median,
        prefill_ratio=paired_ratio(found.prefill, dense.prefill),
        decode_ratio=paired_ratio(found.decode, dense.decode),
    )


POINTS = "points"
_CUTS = "cuts"
_TUNED = "tuned"
_HEALING = "healing"
_FINDINGS = "findings"


@dataclass(frozen=True)
class BuiltPoint:
    """One point's checkpoint."""

    path: Path
    achieved_sparsity: float
    removed_blocks: int
    tuned: TuneMethod | None


@dataclass(frozen=True, eq=False)
class CheckpointBuilder:
    """Where checkpoints are made. Every step resumes what a killed one left there.

    state/findings/SCORING   scores and sensitivities, shared by all ratios of a method
    state/healing            text and the dense model's answers that all points are healed with
    state/cuts/NAME          a cut that is going to be tuned or healed
    state/tuned/NAME         a tuned cut that is going to be healed
    state/points/NAME        a point that has not been measured yet
    """

    request: SweepRequest
    state: Path
    context: RunContext

    def make(self, point: SweepPoint) -> BuiltPoint:
        """Prune, tune and heal.

        Raises: OptionError if the model cannot be cut like that, and what `prune` and `tune` raise.
        """
        request = self.request.prune_request(point)
        tuned = self.request.config.tune.after(request.method)
        tokens = self.request.config.heal_tokens
        folders = [_CUTS, *([_TUNED] if tuned and tokens else []), POINTS] if tuned or tokens else [POINTS]
        made = [self._folder(folder) / point.name for folder in folders]
        findings = self._folder(_FINDINGS) / request.scoring.name
        findings.mkdir(exist_ok=True)
        report: dict[str, Any] = prune(request, OutputOptions(made[0], resume=True), self.context, findings).report
        if tuned:
            self._tune(made[0], tuned, made[1])
        if tokens:
            self._heal(made[-2], tokens, made[-1])
        return BuiltPoint(made[-1], report["achieved_sparsity"], len(report["removed_blocks"]), tuned)

    def clear(self, point: SweepPoint, keep_in: Path | None) -> None:
        """Put a measured point's checkpoint away: into `keep_in`, or nowhere."""
        made = self.state / POINTS / point.name
        if keep_in and made.exists():
            keep_in.mkdir(exist_ok=True)
            made.rename(keep_in / point.name)
        for left in (made, self.state / _CUTS / point.name, self.state / _TUNED / point.name):
            shutil.rmtree(left, ignore_errors=True)

    def _tune(self, cut: Path, method: TuneMethod, final: Path) -> None:
        asked = self.request.config
        config = TuneConfig(pruned=cut, method=method, seed=asked.seed, device=asked.device, dtype=asked.dtype)
        tune(open_tune(config), OutputOptions(final, resume=True), self.context)

    def _heal(self, cut: Path, tokens: int, final: Path) -> None:
        asked = self.request.config
        text = HealText(text=asked.calibration.text, tokens=tokens, special_tokens=asked.calibration.special_tokens)
        config = HealConfig(pruned=cut, text=text, seed=asked.seed, device=asked.device, dtype=asked.dtype)
        heal(open_heal(config), OutputOptions(final, resume=True), self.context, self._folder(_HEALING))

    def _folder(self, name: str) -> Path:
        folder = self.state / name
        folder.mkdir(exist_ok=True)
        return folder
