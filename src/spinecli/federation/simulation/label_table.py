"""How labels lie on the devices of a fleet, by class of device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spinecli.data.examples import Dataset
from spinecli.errors import OptionError


@dataclass(frozen=True)
class LabelRow:
    """All devices of one class."""

    device_class: str
    devices: int
    examples: int
    counts: tuple[int, ...]
    """Examples of each label, in the order of the table's labels."""
    labels_per_device: float
    """Mean number of labels that a device has; 0 if the examples have no labels."""
    divergence: float
    """Mean over the devices of KL(device's labels || all labels), in nats; 0 if the examples have no labels."""


@dataclass(frozen=True)
class LabelTable:
    """One row for each class of device, in order of first occurrence, and one for the fleet."""

    labels: tuple[str, ...]
    rows: tuple[LabelRow, ...]
    fleet: LabelRow


def label_table(dataset: Dataset, parts: Sequence[Sequence[int]], device_classes: Sequence[str]) -> LabelTable:
    """Counts of labels where the devices' parts lie.

    Args:
        parts: indices of the examples of each device.
        device_classes: the class of each device, as many as `parts`.

    Raises: OptionError if there are not as many classes as parts.
    """
    if len(parts) != len(device_classes):
        raise OptionError(
            f"{len(parts)} devices hold data, but the fleet has {len(device_classes)}; deal it out again."
        )
    counts = [_counts(dataset, part) for part in parts]
    overall = _summed(counts, len(dataset.labels))
    divergences = [label_divergence(one, overall) for one in counts]

    def row(name: str, members: Sequence[int]) -> LabelRow:
        return LabelRow(
            device_class=name,
            devices=len(members),
            examples=sum(len(parts[device]) for device in members),
            counts=_summed([counts[device] for device in members], len(dataset.labels)),
            labels_per_device=_mean([sum(count > 0 for count in counts[device]) for device in members]),
            divergence=_mean([divergences[device] for device in members]),
        )

    by_class: dict[str, list[int]] = {}
    for device, name in enumerate(device_classes):
        by_class.setdefault(name, []).append(device)
    rows = tuple(row(name, members) for name, members in by_class.items())
    return LabelTable(dataset.labels, rows, row("fleet", range(len(parts))))


def label_divergence(counts: Sequence[int], overall: Sequence[int]) -> float:
    """KL(p || q) in nats, of the distribution p of `counts` from q of `overall`; 0 log 0 is 0.

    `overall` must count whatever `counts` counts, so that the divergence is finite.
    """
    own, whole = sum(counts), sum(overall)
    return math.fsum(
        count / own * math.log(count / own * whole / total)
        for count, total in zip(counts, overall, strict=True)
        if count
    )


def _counts(dataset: Dataset, part: Sequence[int]) -> tuple[int, ...]:
    counts = [0] * len(dataset.labels)
    for index in part:
        if (label := dataset.examples[index].label) is not None:
            counts[label] += 1
    return tuple(counts)


def _summed(counts: Sequence[Sequence[int]], labels: int) -> tuple[int, ...]:
    return tuple(sum(one[label] for one in counts) for label in range(labels))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
