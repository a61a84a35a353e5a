"""Wanda-sp: Wanda's |W| ||X|| summed over a unit, as FLAP's authors define it for structures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spinecli.pruning.method import BlockView, InputStatistics, UnitScores, score_by_neurons


@dataclass(frozen=True)
class WandaSp:
    """Sum of |W_ij| ||X_j|| over the outputs i of the output projections; no blocks."""

    name: str = "wanda-sp"
    needs_gram: bool = False
    cuts_blocks: bool = False
    cuts_units: bool = True
    refits: bool = False

    def score(self, view: BlockView) -> UnitScores:
        """Importance of every KV group and channel."""
        return score_by_neurons(view, _scores)


def _scores(weight: Tensor, inputs: InputStatistics) -> Tensor:
    return weight.double().abs().sum(dim=0).cpu() * inputs.norms
