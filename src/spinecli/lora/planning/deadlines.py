"""Every deadline worth considering, and what the fleet does under it.

Under deadline T each device takes the deepest depth that it finishes by T. As T rises, one device after another becomes
one block deeper; each such step is an event at the time t_i(k). Sorted once, running sums over the events give the
state of the whole fleet after each, so all deadlines together cost O(n L log(n L)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.lora.planning.ranks import CostTable


@dataclass(frozen=True, eq=False)
class Window:
    """The depths that each device may take, both ends included; (devices,) int64."""

    least: Tensor
    most: Tensor


@dataclass(frozen=True, eq=False)
class Deadlines:
    """Distinct deadlines, rising, with the fleet's state under each; all (deadlines,) float64."""

    seconds: Tensor
    """The deadline; the slowest device finishes exactly then."""
    waiting: Tensor
    """Share of the round that devices wait on average: 1 - mean(t_i) / T."""
    traffic_bytes: Tensor
    """Of all devices together."""
    utility: Tensor
    """Sum over blocks l of gain_l * min(1, holders_l / enough)."""


def deadlines(table: CostTable, window: Window, gains: Tensor, enough: float) -> Deadlines:
    """The grid of LEGEND's search (inferred, see docs/algorithms/legend.md).

    It begins at the earliest deadline that all devices can meet: the slowest device at its least depth.

    Args:
        table: of the devices that take part.
        gains: (blocks,) worth of a block that is trained by enough devices.
        enough: number of devices above which one more adds nothing to a block.
    """
    devices, blocks = table.seconds.shape
    depth = torch.arange(1, blocks + 1)
    base = table.at(table.seconds, window.least)
    floor = base.max()

    deeper = (depth > window.least[:, None]) & (depth <= window.most[:, None])
    device, column = deeper.nonzero(as_tuple=True)
    order = table.seconds[device, column].argsort(stable=True)
    device, column = device[order], column[order]
    times = table.seconds[device, column]

    held = (window.least[:, None] >= depth).sum(dim=0).double()
    start_utility = (gains.flip(0) * (held / enough).clamp(max=1)).sum()
    before = held[column] + _order_within(column, blocks)
    gained = gains.flip(0)[column] * (((before + 1) / enough).clamp(max=1) - (before / enough).clamp(max=1))

    seconds = torch.cat([floor[None], times.clamp(min=floor)])
    total = _running(base.sum(), times - table.seconds[device, column - 1])
    traffic = _running(
        table.at(table.traffic_bytes, window.least).sum(),
        table.traffic_bytes[device, column] - table.traffic_bytes[device, column - 1],
    )
    utility = _running(start_utility, gained)
    # of events at one time only the state after the last is a state that can be
    last = torch.cat([seconds[1:] != seconds[:-1], torch.ones(1, dtype=torch.bool)])
    return Deadlines(
        seconds=seconds[last],
        waiting=1 - total[last] / devices / seconds[last],
        traffic_bytes=traffic[last],
        utility=utility[last],
    )


def depths_under(deadline: Tensor, table: CostTable, window: Window) -> Tensor:
    """The deepest depth in its window that each device finishes by the deadline, else its least; (devices,) int64."""
    in_time = (table.seconds <= deadline).sum(dim=1)
    return torch.minimum(torch.maximum(in_time, window.least), window.most)


def _running(start: Tensor, changes: Tensor) -> Tensor:
    return start + torch.cat([torch.zeros(1, dtype=changes.dtype), changes.cumsum(0)])


def _order_within(groups: Tensor, count: int) -> Tensor:
    """How many entries of the same group stand before each entry; same shape as `groups`."""
    order = groups.argsort(stable=True)
    starts = torch.bincount(groups, minlength=count).cumsum(0).roll(1)
    starts[0] = 0
    places = torch.empty_like(groups)
    places[order] = torch.arange(len(groups)) - starts[groups[order]]
    return places.double()
