"""How bottoms become one again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from spinecli.split.model import Parameters


def weighted_mean(parts: Sequence[Parameters], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i P_i / sum_i w_i of every tensor, added in the order given.

    MergeSFL Eq. 17 with the batch sizes d_i as weights: with one iteration a round and plain SGD the mean is then what
    one step on the merged batch would have made.
    """
    total = math.fsum(weights)
    return {
        name: sum(
            (part[name] * (weight / total) for part, weight in zip(parts[1:], weights[1:], strict=True)),
            parts[0][name] * (weights[0] / total),
        )
        for name in parts[0]
    }
