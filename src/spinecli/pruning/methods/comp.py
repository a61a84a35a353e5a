"""COMP: neurons by the matrix-condition metric, blocks by their influence on the hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.pruning.elimination import elimination_order
from spinecli.pruning.importance import NEURON_METRICS
from spinecli.pruning.method import BlockView, UnitScores, score_by_neurons

COMPENSATED = "m4"
METRICS = (*NEURON_METRICS, COMPENSATED)
DEFAULT_METRIC = COMPENSATED

# Channels that leave between two evaluations of M4: fewer at a time costs more and hardly changes the order.
_CHANNEL_STEP = 8
_EVALUATIONS = 96


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

    @property
    def needs_gram(self) -> bool:
        """Only the compensated reading inverts the Gram matrix."""
        return self.metric == COMPENSATED

    def score(self, view: BlockView) -> UnitScores:
        """Importance of every KV group and channel."""
        if self.metric == COMPENSATED:
            group_width = view.shape.group_size * view.shape.head_dim
            step = max(_CHANNEL_STEP, view.shape.channels // _EVALUATIONS)
            return UnitScores(
                elimination_order(view.attention_output, view.attention_inputs.required_gram, group_width),
                elimination_order(view.feed_forward_output, view.feed_forward_inputs.required_gram, 1, step),
            )
        return score_by_neurons(view, NEURON_METRICS[self.metric])
