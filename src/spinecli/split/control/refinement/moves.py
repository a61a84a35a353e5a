"""Eq. 14 over integers, a row at a time; the steepest moves of a third party's reconstruction of MergeSFL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spinecli.split.control.refinement.problem import Problem

_MOST_MOVES = 2000
_SMALLEST_GAIN = 1e-9


def rounded(batches: Tensor, problem: Problem) -> Tensor:
    """Real batches as integers within limits and budget, (devices,) int64, by largest remainder."""
    scaled = _within_budget(batches, problem.most_rows)
    whole = scaled.floor()
    wanted = min(round(float(scaled.sum())), problem.most_rows) - int(whole.sum())
    order = (scaled - whole).argsort(descending=True, stable=True)
    raised = order[(whole[order] < problem.limits[order])][: max(wanted, 0)]
    return whole.long().index_add(0, raised, torch.ones_like(raised))


def moved(batches: Tensor, problem: Problem) -> Tensor:
    """The batches after single-row moves: down to the limit of the divergence, then back toward d^0 within it.

    While the limit is exceeded, a move that reaches it is taken, of these the cheapest; if there is none, the move that
    comes closest. Then rows are taken back, the most expensive first. Every move makes progress, so none repeats.
    """
    current = float(problem.divergence(batches))
    for _ in range(_MOST_MOVES):
        if current <= problem.divergence_limit:
            break
        devices, steps = _allowed_moves(batches, problem)
        found = problem.after_moves(batches, devices, steps)
        if not len(found) or float(found.min()) >= current - _SMALLEST_GAIN:
            return batches
        away = (batches - problem.batches)[devices] * steps >= 0
        added = problem.costs[devices].where(away, -problem.costs[devices])
        reaching = found <= problem.divergence_limit
        best = (added.where(reaching, math.inf) if bool(reaching.any()) else found).argmin()
        batches = batches.index_add(0, devices[best, None], steps[best, None])
        current = float(problem.divergence(batches))
    return _taken_back(batches, problem) if current <= problem.divergence_limit else batches


def _allowed_moves(batches: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Every device that may have one row more or less, and which, two vectors of int64."""
    up, down = (batches < problem.limits).nonzero().flatten(), (batches > 1).nonzero().flatten()
    if int(batches.sum()) >= problem.most_rows:
        up = up[:0]
    return torch.cat([up, down]), torch.cat([torch.ones_like(up), -torch.ones_like(down)])


def _taken_back(batches: Tensor, problem: Problem) -> Tensor:
    """Rows moved back toward d^0 while the divergence keeps its limit."""
    for _ in range(_MOST_MOVES):
        toward = (problem.batches - batches).sign()
        if int(batches.sum()) >= problem.most_rows:
            toward = toward.clamp(max=0)
        devices = toward.nonzero().flatten()
        allowed = problem.after_moves(batches, devices, toward[devices]) <= problem.divergence_limit
        # Sums that were updated can differ from sums anew in their last bit, which must not cost the limit.
        for best in problem.costs[devices].where(allowed, -1.0).argsort(descending=True, stable=True)[: allowed.sum()]:
            changed = batches.index_add(0, devices[best, None], toward[devices[best], None])
            if float(problem.divergence(changed)) <= problem.divergence_limit:
                batches = changed
                break
        else:
            return batches
    return batches


def _within_budget(batches: Tensor, most: int) -> Tensor:
    """Scaled down, if need be, to the largest common factor that keeps the budget; nobody below one row."""
    if float(batches.sum()) <= most:
        return batches
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = float((batches * middle).clamp(min=1.0).sum()) <= most
        low, high = (middle, high) if fits else (low, middle)
    return (batches * low).clamp(min=1.0)
