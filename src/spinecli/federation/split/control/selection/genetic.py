"""Cohort selection by a genetic algorithm that minimises the divergence of the merged labels.

MergeSFL names a genetic algorithm; its operators are those of a third party's reconstruction, see
docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.federation.split.control.selection.candidates import Candidates, drawn_orders, filled, trimmed


@dataclass(frozen=True)
class GeneticSelection:
    """One bit a device; all individuals of a generation are worked on at once, (population, devices) bool."""

    population: int = 20
    generations: int = 20
    contenders: int = 3
    """Individuals in a tournament; the best of them becomes a parent."""
    mutation: float = 0.05
    """Chance of each bit to flip."""

    def __post_init__(self) -> None:
        if self.population < 2 or self.generations < 0 or self.contenders < 1 or not 0 <= self.mutation <= 1:
            raise ValueError("A population has at least 2 individuals, a tournament 1, and mutation is a chance.")

    def select(self, candidates: Candidates, generator: torch.Generator) -> Tensor:
        """Indices of the chosen devices, rising, int64; never worse than the best of the first population."""
        ranks = _Ranks(candidates)
        nobody = torch.zeros(self.population, candidates.devices, dtype=torch.bool)
        current = filled(nobody, drawn_orders(candidates.priorities, self.population, generator), candidates)
        current = _best_first(current, candidates)
        for _ in range(self.generations):
            children = ranks.repaired(self._children(current, generator), generator)
            current = _best_first(torch.cat([current[:1], children]), candidates)
        return current[0].nonzero().flatten()

    def _children(self, parents: Tensor, generator: torch.Generator) -> Tensor:
        """All but the elite of the next generation, before repair; parents come best first."""
        children, devices = len(parents) - 1, parents.shape[1]
        # The best of a tournament is the one with the lowest place.
        places = torch.randint(len(parents), (2, children, self.contenders), generator=generator).amin(dim=2)
        cuts = torch.randint(1, max(devices, 2), (children, 1), generator=generator)
        crossed = torch.where(torch.arange(devices) < cuts, parents[places[0]], parents[places[1]])
        return crossed ^ (torch.rand(children, devices, generator=generator) < self.mutation)


class _Ranks:
    """In which order repair drops and adds devices: by priority, ties at random."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        # Equal priorities share a place.
        self._adding = torch.unique(-candidates.priorities, return_inverse=True)[1].double()
        largest = int(candidates.batches.max()) + 1
        self._dropping = (self._adding * largest + candidates.batches).double()

    def repaired(self, cohorts: Tensor, generator: torch.Generator) -> Tensor:
        """Drop the lowest priorities, of these the larger batches, until all fits; then add the highest priorities."""
        ties = torch.rand(cohorts.shape, generator=generator, dtype=torch.float64)
        kept = trimmed(cohorts, (self._dropping + ties).argsort(dim=1, stable=True), self._candidates)
        return filled(kept, (self._adding + ties).argsort(dim=1, stable=True), self._candidates)


def _best_first(cohorts: Tensor, candidates: Candidates) -> Tensor:
    """By divergence, then by the rows of the budget that are left unused."""
    unused = -(cohorts * candidates.batches).sum(dim=1)
    by_unused = unused.argsort(stable=True)
    by_divergence = candidates.divergences(cohorts)[by_unused].argsort(stable=True)
    return cohorts[by_unused[by_divergence]]
