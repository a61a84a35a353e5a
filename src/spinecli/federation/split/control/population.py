"""The devices that a server can choose from, as the control module sees them.

How far the labels of a merged batch are from those of the fleet.

MergeSFL Eq. 11 and 12; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def label_distributions(counts: Tensor) -> Tensor:
    """V: the share of each label on each device, (devices, labels) float64, from counts of the same shape.

    Raises: ValueError if a count is negative or a device has no examples.
    """
    totals = counts.double().sum(dim=1, keepdim=True)
    if bool((counts < 0).any()) or bool((totals <= 0).any()):
        raise ValueError("Every device needs at least one example, and no count may be negative.")
    return counts.double() / totals


def reference_distribution(distributions: Tensor) -> Tensor:
    """Phi_0 = (1/N) sum_i V_i of Eq. 12, (labels,): every device counts the same, however many examples it has."""
    return distributions.mean(dim=0)


def merged_distribution(batches: Tensor, distributions: Tensor) -> Tensor:
    """Phi_S = sum_i d_i V_i / sum_i d_i of Eq. 11, (..., labels) float64.

    Args:
        batches: d, (..., devices), at least one row in each cohort; 0 for who does not take part.
        distributions: V, (devices, labels).
    """
    rows = batches.double()
    return rows @ distributions / rows.sum(dim=-1, keepdim=True)


def divergence(distributions: Tensor, reference: Tensor) -> Tensor:
    """KL(Phi || Phi_0) = sum_y Phi(y) log(Phi(y) / Phi_0(y)) in nats, (...) from (..., labels), with 0 log 0 = 0.

    Infinite where Phi has a label that Phi_0 lacks, which cannot be if Phi_0 is the mean over all devices.
    """
    terms = torch.xlogy(distributions, distributions) - torch.xlogy(distributions, reference)
    # Rounding can leave equal distributions just below zero.
    return terms.sum(dim=-1).clamp(min=0.0)


_ANY_ROWS = 2**53


@dataclass(frozen=True, eq=False)
class Population:
    """Devices in a fixed order.

    Raises: ValueError if there is none, if the parts are of different lengths, or if a device has no example or cannot
    hold a single row.
    """

    names: Sequence[str]
    classes: Sequence[str]
    """Of devices that are alike, so that one tells of another."""
    label_counts: Tensor
    """(devices, labels) int64; where there are no labels, one column with the number of examples."""
    memory_rows: Tensor | None = None
    """Most rows that each device's memory holds, (devices,) int64; None where memory is no matter."""

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.classes), len(self.label_counts), len(self.limits)}
        if len(lengths) > 1 or not self.names:
            raise ValueError("Names, classes, label counts and memory must be of the same devices, at least one.")
        if bool((self.label_counts < 0).any()) or int(self.limits.min()) < 1:
            raise ValueError("Every device needs at least one example, and memory for at least one row.")

    @property
    def memory_limits(self) -> list[int]:
        """Most rows of each device that its memory holds."""
        return [_ANY_ROWS] * len(self.names) if self.memory_rows is None else self.memory_rows.tolist()

    @cached_property
    def limits(self) -> Tensor:
        """Most rows of each device's batch, (devices,) int64: no example twice, and no more than memory holds."""
        examples = self.label_counts.sum(dim=1)
        return examples if self.memory_rows is None else examples.minimum(self.memory_rows)

    @cached_property
    def distributions(self) -> Tensor:
        """V, (devices, labels) float64."""
        return label_distributions(self.label_counts)

    @cached_property
    def reference(self) -> Tensor:
        """Phi_0, (labels,) float64."""
        return reference_distribution(self.distributions)
