"""Selections that do not look at labels: what the searches are measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spinecli.errors import OptionError
from spinecli.federation.split.control.selection.candidates import Candidates, Selection, drawn_orders, filled
from spinecli.federation.split.control.selection.genetic import GeneticSelection
from spinecli.federation.split.control.selection.greedy import GreedySelection


class RandomSelection:
    """Devices drawn uniformly, until no further one fits."""

    def select(self, candidates: Candidates, generator: torch.Generator) -> Tensor:
        """Indices of the chosen devices, rising, int64."""
        return _drawn(candidates, torch.ones(candidates.devices, dtype=torch.float64), generator)


class PrioritySelection:
    """Devices drawn in proportion to their priority, until no further one fits."""

    def select(self, candidates: Candidates, generator: torch.Generator) -> Tensor:
        """Indices of the chosen devices, rising, int64."""
        return _drawn(candidates, candidates.priorities, generator)


def _drawn(candidates: Candidates, weights: Tensor, generator: torch.Generator) -> Tensor:
    nobody = torch.zeros(1, candidates.devices, dtype=torch.bool)
    return filled(nobody, drawn_orders(weights, 1, generator), candidates)[0].nonzero().flatten()


SELECTIONS: dict[str, Callable[[], Selection]] = {
    "greedy": GreedySelection,
    "genetic": GeneticSelection,
    "priority": PrioritySelection,
    "random": RandomSelection,
}


def selection_of(name: str) -> Selection:
    """The selection called `name`, as it is by default; OptionError with the list of known ones."""
    try:
        return SELECTIONS[name]()
    except KeyError:
        raise OptionError(f"The selection {name!r} is not one of {', '.join(SELECTIONS)}; name one of these.") from None
