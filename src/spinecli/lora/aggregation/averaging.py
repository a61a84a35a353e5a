"""Weighted mean of A and of B apart, each projection over the devices that hold it.

This is FedIT's mean at equal depth, LEGEND's layer by layer over its holders at different depths (LEGEND, inferred, see
docs/algorithms/aggregation.md), and FFA-LoRA's where all devices share one frozen A. Only there is it the mean of the
products: in general the mean of B times the mean of A is something else than the mean of B A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.lora.aggregation.contribution import Contribution, full_shape, projection_names, resized
from spinecli.lora.factors import Adapter, Factors


def average_factors(contributions: Sequence[Contribution], previous: Adapter) -> dict[str, Factors]:
    """The weighted mean of each factor over the devices that hold the projection.

        A_l = sum_i w_i A_{l,i} / sum_i w_i,    B_l likewise,    i over the holders of l

    which is theta_l + mean_i (theta_{l,i} - theta_l). A row or column that some holders have lost is averaged over the
    others. What nobody holds keeps its previous value; equal tensors come back bit for bit.

    Args:
        contributions: in a fixed order, on which the last bits depend.
        previous: the global adapter before.

    Raises: ValueError if holders of a projection differ in rank.
    """
    return {
        name: _projection(name, holders, previous) if (holders := _holders(name, contributions)) else previous[name]
        for name in projection_names(contributions, previous)
    }


def average_tensors(tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of tensors that every device has, such as a classification head.

    Raises: ValueError if there is no weight, or the devices' tensors have different names.
    """
    if not tensors or sum(weights) <= 0:
        raise ValueError("There is nothing to average: no device has a positive weight.")
    if any(device.keys() != tensors[0].keys() for device in tensors):
        raise ValueError("Devices that are averaged tensor by tensor must have the same tensors.")
    return {
        name: _mean([_Part(device[name], weight) for device, weight in zip(tensors, weights, strict=True)], like)
        for name, like in tensors[0].items()
    }


@dataclass(frozen=True, eq=False)
class _Part:
    """One device's values of a tensor."""

    values: Tensor
    weight: float
    kept: Tensor | None = None
    """Indices along the pruned dimension; None: all."""


def _holders(name: str, contributions: Sequence[Contribution]) -> list[Contribution]:
    return [contribution for contribution in contributions if name in contribution.adapter]


def _projection(name: str, holders: Sequence[Contribution], previous: Adapter) -> Factors:
    ranks = sorted({holder.adapter[name].rank for holder in holders})
    if len(ranks) > 1:
        raise ValueError(f"{name} has ranks {ranks}; factors of different ranks cannot be averaged one by one.")
    d_out, d_in = full_shape(name, holders, previous)
    before = resized(previous[name], ranks[0]) if name in previous else None
    example = holders[0].adapter[name]
    a = _mean(
        [_Part(holder.adapter[name].a, holder.weight, holder.columns.get(name)) for holder in holders],
        before.a if before else example.a.new_zeros(ranks[0], d_in),
        1,
    )
    b = _mean(
        [_Part(holder.adapter[name].b, holder.weight, holder.rows.get(name)) for holder in holders],
        before.b if before else example.b.new_zeros(d_out, ranks[0]),
        0,
    )
    return Factors(a, b)


def _mean(parts: Sequence[_Part], before: Tensor, dimension: int = 0) -> Tensor:
    """Weighted mean, summed in float64; `before` gives the shape, and the values where no weight is."""
    total = torch.zeros(before.shape, dtype=torch.float64, device=before.device)
    mass = torch.zeros_like(total)
    for part in parts:
        values = part.values.to(total)
        weights = torch.full_like(values, part.weight)
        if part.kept is None:
            total += values * weights
            mass += weights
        else:
            kept = part.kept.to(total.device)
            total.index_add_(dimension, kept, values * weights)
            mass.index_add_(dimension, kept, weights)
    return torch.where(mass > 0, (total / mass.clamp_min(1e-300)).float(), before.float())
