"""Which least-squares answer a layer gets: the one that holds best on tokens it was not fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from spinecli.masktuning.least_squares import LayerProblem, Solution, refit, refits, tune_mask, untuned

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_MIDDLING_RIDGE = 0.03


class TuneMethod(str, Enum):
    """What may be tuned."""

    mask = "mask"
    mask_bias = "mask+bias"
    lsq = "lsq"
    auto = "auto"


@dataclass(frozen=True, eq=False)
class LayerRecovery:
    """The chosen answer and what it is worth on held-out tokens."""

    solution: Solution
    choice: str
    """"untuned", "mask", "mask+bias", "lsq" with its ridge, or "conjugate gradients" with their round."""
    error_before: float
    """||T - output||² / ||T||² of the untuned projection on held-out tokens."""
    error_after: float


def recover_quickly(problem: LayerProblem, held_out: int) -> LayerRecovery:
    """A re-fit with a middling ridge on all but the last `held_out` tokens, not measured: to compare cuts by."""
    fitting = problem.rows(0, len(problem.inputs) - held_out)
    return LayerRecovery(refit(fitting, _MIDDLING_RIDGE), f"lsq {_MIDDLING_RIDGE:g}", float("nan"), float("nan"))


def recover(problem: LayerProblem, held_out: int, method: TuneMethod) -> LayerRecovery:
    """Fit on all but the last `held_out` tokens, and choose by the error on those.

    The projection as it is always competes, so no layer gets worse on the held-out tokens.
    A bias is fitted where the projection has one, and by `mask+bias`.
    """
    boundary = len(problem.inputs) - held_out
    fitting, judging = problem.rows(0, boundary), problem.rows(boundary, len(problem.inputs))
    before = untuned(problem)
    best = LayerRecovery(before, "untuned", error_before := judging.relative_error(before), error_before)
    for choice, candidate in _candidates(fitting, method):
        error = judging.relative_error(candidate)
        if error < best.error_after:
            best = LayerRecovery(candidate, choice, error_before, error)
    return best


def _candidates(problem: LayerProblem, method: TuneMethod) -> Iterator[tuple[str, Solution]]:
    has_bias = problem.bias is not None
    if method in (TuneMethod.mask, TuneMethod.auto):
        yield "mask", tune_mask(problem)
    if method is TuneMethod.mask_bias or (method is TuneMethod.auto and has_bias):
        yield "mask+bias", tune_mask(problem, with_bias=True)
    if method in (TuneMethod.lsq, TuneMethod.auto):
        for ridge, solution in refits(problem, RIDGES, with_bias=has_bias):
            yield f"lsq {ridge:g}", solution
