"""COMP: neurons by the matrix-condition metric, blocks by their influence on the hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.pruning.importance import NEURON_METRICS
from spinecli.pruning.method import BlockView, UnitScores, score_by_elimination, score_by_neurons

COMPENSATED = "m4"
METRICS = (*NEURON_METRICS, COMPENSATED)
DEFAULT_METRIC = COMPENSATED


@dataclass(frozen=True)
class Comp:
    """Scores the inputs of the two output projections; a head's score is the sum over its inputs.

    Args:
        metric: a reading of the matrix-condition metric, one of `METRICS`.
    """

    metric: str
    name: str = "comp"
    cuts_blocks: bool = True
    cuts_units: bool = True
    refits: bool = False

    @property
    def needs_gram(self) -> bool:
        """Only the compensated reading inverts the Gram matrix."""
        return self.metric == COMPENSATED

    def score(self, view: BlockView) -> UnitScores:
        """Importance of every KV group and channel."""
        if self.metric == COMPENSATED:
            return score_by_elimination(view)
        return score_by_neurons(view, NEURON_METRICS[self.metric])
