"""The batches of an iteration: balanced, then raised in proportion to use what is left of the ingress budget.

How they are rounded and where raising stops is this project's, see docs/algorithms/mergesfl.md.

Batch sizes under which all devices need about the same time for an iteration, and what waiting is left.

MergeSFL Eq. 7 to 9, with the fixed seconds of an iteration added; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spinecli.federation.split.control.estimates import Paces

# A quotient this close below a whole number is that number; 64 times a pace, divided by the pace, must be 64.
_ROUNDING = 1e-9


def regulated_batches(paces: Paces, largest_batch: int, limits: Tensor) -> Tensor:
    """A batch for each device, (devices,) int64, by Eq. 9.

        l   = argmin D (mu_i + beta_i) + e_i                  the fastest, which gets D
        d_i = max(1, floor((D (mu_l + beta_l) + e_l - e_i) / (mu_i + beta_i)))

    With equal e this is the paper's formula. No batch exceeds D, since nobody does D rows faster than l.

    Args:
        largest_batch: D.
        limits: the most rows of each device, (devices,) int64, at least 1: its examples, or what its memory holds.

    Raises: ValueError if a limit or D is below 1.
    """
    if largest_batch < 1 or int(limits.min()) < 1:
        raise ValueError("The largest batch and every device's limit must be at least 1 row.")
    rows, fixed = paces.row_seconds, paces.fixed_seconds
    fastest = int((largest_batch * rows + fixed).argmin())
    available = largest_batch * rows[fastest] + (fixed[fastest] - fixed)
    quotients = (available / rows + _ROUNDING).floor()
    # A device that takes no time for a row is limited by D alone; its quotient is not a number.
    quotients = torch.where(rows > 0, quotients, float(largest_batch))
    return quotients.clamp(1, largest_batch).long().minimum(limits)


def average_waiting(durations: Tensor) -> float:
    """W, inferred: seconds that a device waits for the slowest, on average over the cohort."""
    return float((durations.max() - durations).mean())


def idle_share(durations: Tensor) -> float:
    """The share of the iteration that devices wait: 1 - mean t_i / max t_i; 0 if it takes no time."""
    longest = float(durations.max())
    return average_waiting(durations) / longest if longest > 0 else 0.0


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


_BISECTIONS = 60
_STEPS = 16


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
