"""LoRA configuration for heterogeneous devices (LCD): one deadline for the fleet, the deepest depth each device meets.

Greedy in the devices, exhaustive in the deadline. LEGEND names a greedy algorithm for this; the steps are inferred, see
docs/algorithms/legend.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.lora.planning.ranks import CostTable, lowered


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


_ROUNDING = 1e-9
"""Running sums over many devices are exact to far less than this."""


@dataclass(frozen=True)
class Goals:
    """What a configuration has to keep, and what it is to be good at."""

    max_waiting: float
    """Share of the round that devices may wait on average, 0 to 1 (LEGEND's epsilon, relative to the round)."""
    coverage: float
    """Share of the devices, above 0 to 1, from which on one more adds nothing to a block (n_min)."""
    min_depth: int = 1
    traffic_budget: float | None = None
    """Bytes a round, up and down, of all devices together."""
    depth_change: int = 2
    """Blocks by which a device's depth may change from one round to the next."""


@dataclass(frozen=True, eq=False)
class Configuration:
    """Depths and ranks, what they are predicted to cost, and which goals they miss."""

    ranks: Tensor
    """(blocks,) int64 rank distribution, the same for all devices."""
    depths: Tensor
    """(devices,) int64; 0 for a device whose memory does not hold the least depth."""
    seconds: Tensor
    """(devices,) float64 until the device's update has arrived; 0 where it takes no part."""
    deadline: float
    """Seconds of the round: those of the slowest device."""
    waiting: float
    """Share of the round that the devices wait on average."""
    utility: float
    traffic_bytes: float
    meets_waiting: bool
    """False if no deadline keeps the waiting goal; the one with the least waiting was taken."""
    meets_traffic: bool
    """False if not even the lowest ranks and the least depths keep the traffic goal."""

    @property
    def excluded(self) -> Tensor:
        """Indices of the devices that take no part."""
        return (self.depths == 0).nonzero()[:, 0]


def configure(
    predict: Callable[[Tensor], CostTable],
    ranks: Tensor,
    memory_limits: Tensor,
    goals: Goals,
    previous: Tensor | None = None,
) -> Configuration:
    """Choose a depth for every device, and lower ranks and then depths as far as the traffic goal asks for.

    Under a deadline T a device takes the largest depth k with t_i(k) <= T that its memory holds. Of the deadlines whose
    waiting keeps the goal, the one with the most utility a second is taken. While the traffic exceeds its goal, r_base
    is lowered by one and everything is repeated; at the lowest ranks, the blocks next to the input are given up one by
    one instead.

    Args:
        predict: costs of a round under a rank distribution.
        ranks: (blocks,) the distribution to start from.
        memory_limits: (devices,) bytes.
        previous: (devices,) depths of the round before, 0 where a device had none; None for a first round.

    Returns: a plan without any device, of 0 seconds, if the memory of none holds the least depth.

    Raises: ValueError if predicted costs are not finite, not positive, or fall with depth.
    """
    for conceded, deepest in _concessions(ranks, goals):
        table = predict(conceded)
        window = _window(table, memory_limits, goals, previous, deepest)
        found = _within(window, table, conceded, goals)
        if found.meets_traffic:
            break
    return found


def _concessions(ranks: Tensor, goals: Goals) -> Iterator[tuple[Tensor, int]]:
    """Rank distributions and greatest depths, each with less traffic than the one before, nothing given up first."""
    blocks = len(ranks)
    yield ranks, blocks
    while not torch.equal(fewer := lowered(ranks), ranks):
        ranks = fewer
        yield ranks, blocks
    for deepest in range(blocks - 1, goals.min_depth - 1, -1):
        yield ranks, deepest


def _within(window: Window, table: CostTable, ranks: Tensor, goals: Goals) -> Configuration:
    """The best deadline for devices that keep to a window of depths."""
    devices = len(window.most)
    part = (window.most > 0).nonzero()[:, 0]
    if not len(part):
        return _nobody(ranks, devices)
    table = CostTable(table.seconds[part], table.traffic_bytes[part], table.memory_bytes[part])
    window = Window(window.least[part], window.most[part])
    _check(table)
    grid = deadlines(table, window, ranks.double(), max(1.0, goals.coverage * len(part)))
    chosen = _choose(grid, goals)
    depths = torch.zeros(devices, dtype=torch.int64)
    seconds = torch.zeros(devices, dtype=torch.float64)
    depths[part] = depths_under(grid.seconds[chosen], table, window)
    seconds[part] = table.at(table.seconds, depths[part])
    traffic = float(grid.traffic_bytes[chosen])
    return Configuration(
        ranks=ranks,
        depths=depths,
        seconds=seconds,
        deadline=float(grid.seconds[chosen]),
        waiting=max(0.0, float(grid.waiting[chosen])),
        utility=float(grid.utility[chosen]),
        traffic_bytes=traffic,
        meets_waiting=bool(grid.waiting[chosen] <= goals.max_waiting + _ROUNDING),
        meets_traffic=goals.traffic_budget is None or traffic <= goals.traffic_budget,
    )


def _nobody(ranks: Tensor, devices: int) -> Configuration:
    return Configuration(
        ranks=ranks,
        depths=torch.zeros(devices, dtype=torch.int64),
        seconds=torch.zeros(devices, dtype=torch.float64),
        deadline=0.0,
        waiting=0.0,
        utility=0.0,
        traffic_bytes=0.0,
        meets_waiting=True,
        meets_traffic=True,
    )


def _window(table: CostTable, memory_limits: Tensor, goals: Goals, previous: Tensor | None, deepest: int) -> Window:
    """Depths that memory, traffic and the round before allow; most = 0 where memory does not hold the least depth.

    Smoothing is a window of the search and not a correction after it, so that the waiting is that of the plan in use.
    Memory wins over smoothing, and smoothing over `deepest`.
    """
    fits = (table.memory_bytes <= memory_limits[:, None]).long().cumprod(dim=1).sum(dim=1)
    least, most = torch.full_like(fits, goals.min_depth), fits.clamp(max=deepest)
    if previous is not None:
        known = previous > 0
        above = (previous + goals.depth_change).clamp(min=goals.min_depth)
        below = (previous - goals.depth_change).clamp(min=goals.min_depth)
        least = torch.where(known, torch.minimum(below, fits), least)
        most = torch.where(known, torch.maximum(torch.minimum(most, above), least), most)
    holds = fits >= goals.min_depth
    return Window(least.where(holds, torch.zeros_like(least)), most.where(holds, torch.zeros_like(most)))


def _check(table: CostTable) -> None:
    for figure in (table.seconds, table.traffic_bytes):
        if not bool(figure.isfinite().all()) or bool((figure.diff(dim=1) < 0).any()):
            raise ValueError("predicted costs must be finite and must not fall with depth")
    if not bool((table.seconds > 0).all()):
        raise ValueError("every round takes time")


def _choose(grid: Deadlines, goals: Goals) -> int:
    """Index of the deadline to take: most utility a second among the patient ones, else the least waiting."""
    patient = grid.waiting <= goals.max_waiting + _ROUNDING
    if not bool(patient.any()):
        return _first(-grid.waiting)
    return _first((grid.utility / grid.seconds).where(patient, torch.tensor(-torch.inf, dtype=torch.float64)))


def _first(score: Tensor) -> int:
    """The earliest of the deadlines whose score is the highest up to rounding."""
    best = score.max()
    return int((score >= best - _ROUNDING * best.abs()).nonzero()[0, 0])
