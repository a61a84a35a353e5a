"""The figures of one model of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.evaluation.latency import paired_ratio
from spinecli.evaluation.models import Subject, weights_of
from spinecli.evaluation.results import LatencyResult
from spinecli.sweeping.held_out import HeldOut
from spinecli.sweeping.request import SweepRequest, with_subjects
from spinecli.sweeping.results import Row, Speed


@dataclass(frozen=True)
class Label:
    """What a row is called, and how its model was made."""

    name: str
    method: str | None = None
    tuned: str | None = None
    sparsity: float = 0.0
    achieved_sparsity: float = 0.0
    removed_blocks: int = 0


def measure(request: SweepRequest, subject: Subject, label: Label, held_out: HeldOut) -> Row:
    """Measure a model; its speed beside the dense one, in turns.

    Raises: MeasurementError.
    """
    weights = weights_of(subject)
    return Row(
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
