"""FedSpine's aggregation over different ranks and masks: each entry is averaged over the devices that have it.

The paper's formula is not at hand; this is the project's reading (FedSpine, inferred, see
docs/algorithms/aggregation.md). Devices lose whole rows or whole columns of a projection, so dividing each entry by the
weight that covers it is scaling the rows of every B_i, or the columns of every A_i: the mean stays a stack of factors,
and no dense matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinecli.lora.aggregation.contribution import Contribution, embedded, full_shape, projection_names
from spinecli.lora.aggregation.stacking import compress, sum_of_products
from spinecli.lora.factors import Adapter, Factors

COVERAGE_FLOOR = 0.1
"""Share of the round's weight below which an entry's mean is filled up with its previous value."""


def heterogeneity_weight(samples: float, rank: int, largest_rank: int, ratio: float) -> float:
    """om_i = |D_i| (r_i / r_max)^0.5 (1 - p_i)^0.5, the weight of one device before it is normalised.

    Args:
        samples: the device's training examples.
        ratio: its pruning ratio p_i, from 0 to 1.
    """
    return float(samples * (rank / largest_rank) ** 0.5 * (1 - ratio) ** 0.5)


def average_covered(
    contributions: Sequence[Contribution],
    previous: Adapter,
    rank: int,
    *,
    floor: float = COVERAGE_FLOOR,
    by_component: bool = False,
) -> dict[str, Factors]:
    """`covered_stack` of every projection, compressed to `rank`; projections nobody holds are returned as they were.

    Args:
        contributions: in a fixed order; weights from `heterogeneity_weight`.
        previous: the global adapter before, at full shape.
    """
    return {
        name: compress(covered_stack(name, contributions, previous, floor=floor, by_component=by_component), rank)
        if any(name in contribution.adapter for contribution in contributions)
        else previous[name]
        for name in projection_names(contributions, previous)
    }


def covered_stack(
    name: str,
    contributions: Sequence[Contribution],
    previous: Adapter,
    *,
    floor: float = COVERAGE_FLOOR,
    by_component: bool = False,
) -> Factors:
    """Factors whose product is the mean of one projection over the devices that cover each entry.

        c   = sum_i om_i M_i,   sum_i om_i = 1                     coverage of an entry
        DW  = ( sum_i om_i M_i * B_i A_i ) / max(c, floor)  +  ( 1 - c / max(c, floor) ) * DW_before

    M_i is 1 where device i holds the projection and has kept the row (or the column). The second term is 0 at any entry
    with enough coverage, and DW_before where nobody covers it.

    Args:
        by_component: coverage is counted for each component k of the factors by itself: B_i[:, k] A_i[k, :] is
            averaged over the devices with r_i > k, and kept where there is none (rank-partitioned aggregation, after
            the abstract of raFLoRA). It presumes that devices started from the leading components of `previous`.

    Raises: ValueError if one device has lost rows of the projection and another columns.
    """
    holders = [contribution for contribution in contributions if name in contribution.adapter]
    by_columns = any(name in holder.columns for holder in holders)
    if by_columns and any(name in holder.rows for holder in holders):
        raise ValueError(f"Some devices have lost rows of {name}, and others columns; their mean is not a product.")
    shape = full_shape(name, holders, previous)
    before = previous.get(name)
    everything = sum(contribution.weight for contribution in contributions) or 1.0
    width = max([holder.adapter[name].rank for holder in holders] + ([before.rank] if before else []))

    units = shape[1] if by_columns else shape[0]
    coverage = torch.zeros(units, width, dtype=torch.float64)
    for holder in holders:
        reached = holder.adapter[name].rank if by_component else width
        coverage[_kept(holder, name, units), :reached] += holder.weight / everything
    divisor = coverage.clamp_min(max(floor, 1e-300))

    parts = []
    for holder in holders:
        factors, kept = holder.adapter[name], _kept(holder, name, units)
        shares = holder.weight / everything / divisor[kept, : factors.rank]
        scaled = _scaled(factors, shares, by_columns)
        parts.append(embedded(scaled, shape, holder.rows.get(name), holder.columns.get(name)))
    if before is not None:
        remaining = 1 - (coverage / divisor)[:, : before.rank]
        if bool(remaining.any()):
            parts.append(_scaled(before, remaining, by_columns))
    return sum_of_products(parts)


def _kept(holder: Contribution, name: str, units: int) -> Tensor:
    indices = holder.rows.get(name, holder.columns.get(name))
    return torch.arange(units) if indices is None else indices.cpu()


def _scaled(factors: Factors, shares: Tensor, by_columns: bool) -> Factors:
    """Factors with B (units, rank), or A transposed, multiplied by shares of the same shape."""
    shares = shares.to(factors.a.device)
    if by_columns:
        return Factors((factors.a * shares.T).float(), factors.b)
    return Factors(factors.a, (factors.b * shares).float())
