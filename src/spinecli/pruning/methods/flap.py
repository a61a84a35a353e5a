"""FLAP: units whose inputs fluctuate least are the easiest to replace by a constant."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spinecli.pruning.method import BlockView, InputStatistics, UnitScores, score_by_neurons


@dataclass(frozen=True)
class Flap:
    """The metric WIFV, Var(X_j) ||W_:j||², at uniform widths; no blocks.

    FLAP's bias compensation is not part of the cut; `spine tune --method mask+bias` supplies a bias where the family's
    plain format has one.
    """

    name: str = "flap"
    needs_gram: bool = False
    cuts_blocks: bool = False
    cuts_units: bool = True
    refits: bool = False

    def score(self, view: BlockView) -> UnitScores:
        """Importance of every KV group and channel."""
        return score_by_neurons(view, _scores)


def _scores(weight: Tensor, inputs: InputStatistics) -> Tensor:
    return inputs.variances * weight.double().square().sum(dim=0).cpu()
