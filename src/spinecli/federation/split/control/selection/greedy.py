"""Cohort selection by descent: a cohort drawn by priority, improved by exchanging one device for another.

This project's, not MergeSFL's; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.federation.split.control.estimates import divergence
from spinecli.federation.split.control.selection.candidates import Candidates, drawn_orders, filled

_SMALLEST_GAIN = 1e-12


@dataclass(frozen=True)
class GreedySelection:
    """Steepest descent over exchanges, within a pool that is drawn by priority.

    A pure descent would take the same well-mixed devices in every round. Three things bring the others back: the
    cohort it starts from and the pool of those who may be exchanged into it are drawn in proportion to priority, and
    the first of those drawn keep their seats.
    """

    kept_share: float = 0.1
    """Share of the first cohort whose seats are not up for exchange, rounded up."""
    starts: int = 4
    """Cohorts to descend from at most; all have the kept seats in common."""
    pool: int = 4
    """Devices that may be exchanged into the cohort, in multiples of the cohort."""
    shortlist: int = 32
    """Of the devices that are best to drop, and of those best to add, this many are tried in all pairs."""
    enough: float = 1e-3
    """Divergence, in nats, below which the search ends."""

    def __post_init__(self) -> None:
        if min(self.starts, self.shortlist) < 1 or min(self.pool, self.enough) < 0 or not 0 <= self.kept_share <= 1:
            raise ValueError("The kept share is between 0 and 1, starts and shortlist at least 1, nothing negative.")

    def select(self, candidates: Candidates, generator: torch.Generator) -> Tensor:
        """Indices of the chosen devices, rising, int64; never worse than the cohort that was drawn first."""
        orders = drawn_orders(candidates.priorities, self.starts, generator)
        seats = self._seats(orders[0], candidates)
        best: _Search | None = None
        for order in orders:
            search = self._descended(seats, order[~torch.isin(order, seats)], candidates)
            if best is None or search.divergence < best.divergence:
                best = search
            if best.divergence <= self.enough:
                break
        assert best is not None
        return best.cohort.sort().values

    def _seats(self, order: Tensor, candidates: Candidates) -> Tensor:
        """The devices that no exchange removes."""
        drawn = _taken(order, candidates)
        return drawn[: math.ceil(self.kept_share * len(drawn))]

    def _descended(self, seats: Tensor, others: Tensor, candidates: Candidates) -> _Search:
        """The seats and what else fits of the others in their order, improved until nothing improves it."""
        order = torch.cat([seats, others])
        drawn = _taken(order, candidates)
        waiting = order[~torch.isin(order, drawn)]
        search = _Search(candidates, seats, drawn[len(seats) :], waiting[: self.pool * len(drawn)])
        # An exchange for a smaller batch can make room for one more device.
        while (search.divergence > self.enough and search.exchange(self.shortlist)) or search.add():
            pass
        return search


def _taken(order: Tensor, candidates: Candidates) -> Tensor:
    """Of the devices in this order those that fit, first come first served."""
    nobody = torch.zeros(1, candidates.devices, dtype=torch.bool)
    return order[filled(nobody, order[None], candidates)[0, order]]


class _Search:
    """A cohort on its way down; every step recomputes its sums, so that no rounding error piles up."""

    def __init__(self, candidates: Candidates, kept: Tensor, movable: Tensor, pool: Tensor) -> None:
        self._candidates = candidates
        self._kept, self._movable, self._pool = kept, movable, pool

    @property
    def cohort(self) -> Tensor:
        """Indices of its devices."""
        return torch.cat([self._kept, self._movable])

    @property
    def _sums(self) -> Tensor:
        """Expected rows of each label, (labels,)."""
        return self._candidates.label_rows[self.cohort].sum(dim=0)

    @property
    def _rows(self) -> int:
        return int(self._candidates.batches[self.cohort].sum())

    @property
    def divergence(self) -> float:
        """KL(Phi_S || Phi_0)."""
        return float(self._divergence(self._sums))

    def exchange(self, shortlist: int) -> bool:
        """Make the exchange that lowers the divergence most; False if there is none."""
        if not len(self._movable) or not len(self._pool):
            return False
        sums, rows, label_rows, batches = self._sums, self._rows, self._candidates.label_rows, self._candidates.batches
        movable, pool = label_rows[self._movable], label_rows[self._pool]
        leaving = _lowest(self._divergence(sums - movable), shortlist)
        coming = _lowest(self._divergence(sums + pool), shortlist)
        pairs = self._divergence(sums - movable[leaving, None] + pool[None, coming])
        change = batches[self._pool[coming]][None] - batches[self._movable[leaving]][:, None]
        pairs = pairs.where(rows + change <= self._candidates.most_rows, math.inf)
        best = int(pairs.argmin())
        if not float(pairs.flatten()[best]) < float(self._divergence(sums)) - _SMALLEST_GAIN:
            return False
        out, into = leaving[best // len(coming)], coming[best % len(coming)]
        movable_after, pool_after = self._movable.clone(), self._pool.clone()
        movable_after[out], pool_after[into] = self._pool[into], self._movable[out]
        self._movable, self._pool = movable_after, pool_after
        return True

    def add(self) -> bool:
        """Add the device that fits and lowers the divergence most, if it does not rise; False if there is none."""
        room = self._candidates.most_rows - self._rows
        if len(self._kept) + len(self._movable) >= self._candidates.largest_cohort:
            return False
        fitting = (self._candidates.batches[self._pool] <= room).nonzero().flatten()
        if not len(fitting):
            return False
        sums = self._sums
        found = self._divergence(sums + self._candidates.label_rows[self._pool[fitting]])
        best = int(found.argmin())
        if float(found[best]) > float(self._divergence(sums)):
            return False
        self._movable = torch.cat([self._movable, self._pool[fitting[best]][None]])
        self._pool = torch.cat([self._pool[: fitting[best]], self._pool[fitting[best] + 1 :]])
        return True

    def _divergence(self, sums: Tensor) -> Tensor:
        """KL of the merged distribution with these sums, (...) from (..., labels)."""
        # Subtraction can leave a label just below zero, and a cohort of one leaves nothing at all.
        sums = sums.clamp(min=0.0)
        return divergence(sums / sums.sum(dim=-1, keepdim=True).clamp(min=_SMALLEST_GAIN), self._candidates.reference)


def _lowest(values: Tensor, count: int) -> Tensor:
    return values.argsort(stable=True)[:count]
