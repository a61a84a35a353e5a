"""What a federated run comes to, read off its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spinecli.artifacts.record import Record
from spinecli.errors import FederationError
from spinecli.federation.history import HISTORY_NAME, RoundRecord


class ClassResult(Record):
    """What one group of devices would run."""

    group: str
    devices: int
    ratio: float
    """Share of the block parameters that is cut."""


class FederatedResult(Record):
    """The figures that strategies are compared by. Seconds are the engine's."""

    rounds: int
    seconds: float
    bytes: int
    accuracy: float | None
    """At the last evaluation."""
    loss: float | None
    best_accuracy: float | None
    target_accuracy: float | None
    seconds_to_target: float | None
    """When the first evaluation at or above the target was in; None if none was."""
    bytes_to_target: int | None
    idle_share: float
    """Mean over the rounds."""
    lost: dict[str, dict[str, int]]
    """How often each device was lost, by reason; devices that never were are left out."""
    groups: tuple[ClassResult, ...] = ()
    divergence: float | None = None
    """Of merged from the fleet's labels, in nats, mean over the rounds; None where the model is not split."""
    infeasible_rounds: int = 0
    """Rounds in which it could not keep its limit."""


def summarised(
    rounds: Sequence[RoundRecord], target: float | None, groups: Sequence[ClassResult] = ()
) -> FederatedResult:
    """Sum up finished rounds."""
    evaluations = [record.evaluation for record in rounds if record.evaluation is not None]
    reached = _first_reaching(rounds, target)
    splits = [record.split for record in rounds if record.split is not None]
    lost: dict[str, Counter[str]] = {}
    for record in rounds:
        for device in record.devices:
            if device.lost is not None:
                lost.setdefault(device.device, Counter())[device.lost] += 1
    return FederatedResult(
        rounds=len(rounds),
        seconds=rounds[-1].ended if rounds else 0.0,
        bytes=sum(record.bytes for record in rounds),
        accuracy=evaluations[-1].accuracy if evaluations else None,
        loss=evaluations[-1].loss if evaluations else None,
        best_accuracy=max((found.accuracy for found in evaluations), default=None),
        target_accuracy=target,
        seconds_to_target=rounds[reached].ended if reached is not None else None,
        bytes_to_target=sum(record.bytes for record in rounds[: reached + 1]) if reached is not None else None,
        idle_share=sum(record.idle_share for record in rounds) / len(rounds) if rounds else 0.0,
        lost={device: dict(sorted(reasons.items())) for device, reasons in sorted(lost.items())},
        groups=tuple(groups),
        divergence=sum(split.divergence for split in splits) / len(splits) if splits else None,
        infeasible_rounds=sum(not split.feasible for split in splits),
    )


def require_accepted(rounds: Sequence[RoundRecord], deadline: float | None, kept: Path) -> None:
    """Refuse to publish a run that learned nothing.

    Args:
        deadline: seconds that the run waited for answers.
        kept: where the history lies.

    Raises: FederationError that says why no answer was accepted, and what would change that.
    """
    if any(record.accepted for record in rounds):
        return
    lost = [(record.round, device) for record in rounds for device in record.devices if device.lost is not None]
    counts = Counter(str(device.lost) for _, device in lost)
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "no device took part"
    if lost:
        number, first = lost[0]
        told += f"; first {first.device} in round {number + 1}: {first.explanation.rstrip('.')}"
    waited = f", above {deadline:g} s, or none" if deadline is not None else ""
    ways = {
        "late": f"a longer --deadline{waited}",
        "refused": "a lower --learning-rate",
        "failed": "more --rounds or a larger --cohort",
    }
    way = " and ".join(way for reason, way in ways.items() if counts[reason]) or "a larger --cohort or another fleet"
    raise FederationError(
        f"No answer was accepted in any of the {len(rounds)} rounds ({told}), so nothing was learned and nothing is "
        f"published; see {kept / HISTORY_NAME}, run the rounds again with --resume, or start over with --overwrite and "
        f"{way}."
    )


def _first_reaching(rounds: Sequence[RoundRecord], target: float | None) -> int | None:
    if target is None:
        return None
    hits = (n for n, record in enumerate(rounds) if record.evaluation and record.evaluation.accuracy >= target)
    return next(hits, None)
