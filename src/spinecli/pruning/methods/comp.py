"""COMP: neurons by the matrix-condition metric, blocks by their influence on the hidden states.

Importance of the input neurons of a dense layer Y = X Wᵀ: COMP's matrix-condition metric and its readings.

No formula of the metric is published where we could read it, so every reading below is inferred; see
docs/algorithms/comp.md. In all of them `weight` is (d_out, d_in) and the result is (d_in,), float64, higher = keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from spinecli.pruning.method import BlockView, InputStatistics, UnitScores, score_by_elimination, score_by_neurons

NeuronMetric = Callable[[Tensor, InputStatistics], Tensor]


def output_change(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """M0: ||W_:j|| ||X_j||, the exact Frobenius norm of the term that leaves with neuron j."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64).cpu()
    return norms * inputs.norms


def relative_output_change(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """M1: M0 / ||Y||, the condition number of the product per neuron; comparable across dense layers."""
    relative: Tensor = output_change(weight, inputs) / max(inputs.output_square_sum, 1e-300) ** 0.5
    return relative


def condition_bound(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """M2: kappa(W) ||W_:j|| ||X_j|| / (||W|| ||X||), the textbook bound on the relative change of Y."""
    singular = _singular_values(weight)
    condition = singular.max() / singular.min().clamp_min(singular.max() * 1e-12)
    whole = torch.linalg.vector_norm(weight, dtype=torch.float64).cpu() * inputs.square_sum.sum().sqrt()
    bound: Tensor = condition * output_change(weight, inputs) / whole.clamp_min(1e-300)
    return bound


def condition_change(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """M3: |kappa(W) - kappa(W without column j)| / kappa(W), to first order in the extreme singular values.

    The literal reading of "matrix condition". It ignores the inputs; kept as an ablation.
    """
    values, vectors = torch.linalg.eigh(weight.double() @ weight.double().T)
    low, high = values[0].clamp_min(values[-1] * 1e-12), values[-1]
    along_low = (vectors[:, 0] @ weight.double()).square()
    along_high = (vectors[:, -1] @ weight.double()).square()
    before = (high / low).sqrt()
    after = ((high - along_high).clamp_min(0) / (low - along_low).clamp_min(high * 1e-12)).sqrt()
    change: Tensor = ((after - before).abs() / before).cpu()
    return change


def _singular_values(weight: Tensor) -> Tensor:
    """Singular values through the smaller Gram matrix: (min(d_out, d_in),)."""
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    values: Tensor = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().cpu()
    return values


NEURON_METRICS: Mapping[str, NeuronMetric] = MappingProxyType(
    {
        "m0": output_change,
        "m1": relative_output_change,
        "m2": condition_bound,
        "m3": condition_change,
    }
)


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
