"""Selections that do not look at labels: what the searches are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from spinecli.split.control.selection.candidates import Candidates
from spinecli.split.control.selection.filling import drawn_orders, filled


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
