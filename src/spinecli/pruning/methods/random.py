"""Random: what any criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spinecli.pruning.method import BlockView, UnitScores


@dataclass(frozen=True)
class Random:
    """Scores drawn from a generator of its own per block, so that a resumed run draws the same."""

    seed: int = 0
    name: str = "random"
    needs_gram: bool = False
    cuts_blocks: bool = False
    cuts_units: bool = True
    refits: bool = False

    def score(self, view: BlockView) -> UnitScores:
        """Uniform random numbers."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + view.index)
        groups = torch.rand(view.shape.kv_heads, generator=generator, dtype=torch.float64)
        return UnitScores(groups, torch.rand(view.shape.channels, generator=generator, dtype=torch.float64))
