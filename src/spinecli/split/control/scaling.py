"""Batches raised in proportion, to use what is left of the ingress budget.

MergeSFL's last step of batch regulation; how it rounds and where it stops is this project's, see
docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BISECTIONS = 60
_STEPS = 16
_ROUNDING = 1e-9


def whole_rows(budget_rows: float) -> int:
    """The rows that a budget holds, as an integer even where it is unlimited."""
    return math.floor(min(budget_rows, 2**53))


def scaled_up(
    batches: Tensor,
    limits: Tensor,
    largest_batch: int,
    budget_rows: float,
    accepted: Callable[[Tensor], bool] = lambda _: True,
) -> Tensor:
    """The batches times the largest common factor that is allowed, (devices,) int64; none gets smaller.

    The factor is bounded by the budget and by D: the device with the most rows may reach D, the others keep their
    proportion to it, so that nobody waits longer for the slowest in relation to the iteration. A device at its own
    limit stays there without holding up the others.

    Args:
        batches: (devices,) int64, at least 1, within the limits and the budget.
        limits: the most rows of each device, (devices,) int64.
        largest_batch: D.
        budget_rows: most rows of all devices together.
        accepted: a test that the result must pass, or smaller factors are tried, down to 1.

    Raises: ValueError if the batches exceed the budget, D, or their limits before they are scaled.
    """
    most, caps = whole_rows(budget_rows), limits.clamp(max=largest_batch)
    if int(batches.sum()) > most or bool((batches > caps).any()) or int(batches.min()) < 1:
        raise ValueError(f"{batches.tolist()} rows are beyond the budget of {budget_rows} rows or a device's limit.")
    largest = _largest_factor(batches, limits, largest_batch, most)
    for step in range(_STEPS, 0, -1):
        scaled = _rounded(batches, 1 + (largest - 1) * step / _STEPS, caps, most)
        if accepted(scaled):
            return scaled
    return batches.clone()


def _largest_factor(batches: Tensor, limits: Tensor, largest_batch: int, most: int) -> float:
    """The factor from which on a further rise breaks the budget, or raises nobody who may still grow."""
    growing = batches < limits
    if not bool(growing.any()):
        return 1.0

    def allowed(factor: float) -> bool:
        product = (batches * factor + _ROUNDING).floor().minimum(limits.double())
        return bool(product.max() <= largest_batch) and bool(product.sum() <= most)

    low, high = 1.0, largest_batch / float(batches[growing].min()) + 1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    # The bisection may end just short of a whole product, which the rounding below makes good.
    return low


def _rounded(batches: Tensor, factor: float, caps: Tensor, most: int) -> Tensor:
    """Rounded down, then up where the fraction is at least one half, largest first, as far as the budget goes."""
    product = (batches * factor).minimum(caps.double())
    whole = (product + _ROUNDING).floor()
    fractions = product - whole
    order = fractions.argsort(descending=True, stable=True)
    spare = most - int(whole.sum())
    raised = order[: max(spare, 0)]
    raised = raised[fractions[raised] >= 0.5]
    return whole.long().index_add(0, raised, torch.ones_like(raised)).minimum(caps)
