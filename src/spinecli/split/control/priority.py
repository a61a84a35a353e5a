"""Who should come back soon: MergeSFL Eq. 13."""

from __future__ import annotations

from torch import Tensor


def priorities(participations: Tensor) -> Tensor:
    """p_i = sum_j (K_j + 1) / (K_i + 1), (devices,) float64; the rarer a device took part, the higher.

    Args:
        participations: K, completed rounds of each device, (devices,) int64.

    Raises: ValueError if one is negative.
    """
    if bool((participations < 0).any()):
        raise ValueError("A device cannot have completed fewer than 0 rounds.")
    taken = participations.double() + 1
    return taken.sum() / taken
