"""How far the labels of a merged batch are from those of the fleet.

MergeSFL Eq. 11 and 12; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

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
