"""Closed-form recovery of one output projection.

The student's projection sees inputs h and should produce targets t. Three kinds of answer, all linear least squares:

    mask   min_m  Σ w ||t - W0 diag(m) h||²              one scale per input, (WᵀW) ∘ (Σ w h hᵀ) as normal matrix
    refit  min_W  Σ w ||t - W h||² + λ||W - W0||²        the whole projection, drawn toward the weights it has
    bias   on top of either, by centring h and t over the tokens

t is a mixture of two targets: what the dense projection makes of the student's own inputs, which asks the kept inputs
to stand in for the cut ones and no more, and what brings the student back to the teacher, which also asks them to make
up for what earlier blocks got wrong. The second wants more tokens. The share of it is the best one on held-out tokens.

That COMP tunes its masks so is inferred (after Kwon et al. 2022); see docs/algorithms/comp.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery.moments import Moments

MASK_RIDGE = 0.01
MASK_RANGE = (0.0, 3.0)
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_SLICE_ROWS = 4096


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """What one output projection sees and should produce, on tokens to fit to and on others to judge by."""

    fitting: Moments
    judging: Moments
    weight: Tensor
    """W0, (d, k): the weights it has."""
    bias: Tensor | None
    """(d,) or None."""
    own: Moments | None = None
    """`fitting` with what the dense projection makes of the student's inputs as targets; None if it is not known."""

    def error(self, solution: Solution) -> float:
        """Σ w ||t - output||² / Σ w ||t||² over the judging tokens."""
        return self.judging.error(solution.weight, solution.bias)


@dataclass(frozen=True, eq=False)
class Solution:
    """New weights of one projection, the scales already folded in."""

    weight: Tensor
    """(d, k)."""
    bias: Tensor | None
    """(d,) or None."""
    scales: Tensor | None = None
    """(k,) if the solution is a mask; None if the projection was re-fitted or left alone."""

    def rounded(self, dtype: torch.dtype) -> Solution:
        """The solution as it will be stored, so that later blocks are tuned against what is really there."""
        bias = None if self.bias is None else self.bias.to(dtype).to(self.bias.dtype)
        return Solution(self.weight.to(dtype).to(self.weight.dtype), bias, self.scales)


@dataclass(frozen=True, eq=False)
class LayerRecovery:
    """The chosen answer and what it is worth on held-out tokens."""

    solution: Solution
    choice: str
    """"untuned", "mask", "mask+bias", "lsq" with its ridge and its share of the teacher's targets, or "conjugate
    gradients" with their round."""
    error_before: float
    """Of the untuned projection, relative and squared."""
    error_after: float


def recover(problem: LayerProblem, method: TuneMethod, ridges: Sequence[float] = RIDGES) -> LayerRecovery:
    """Fit in every way that `method` names, and choose by the error on the tokens that judge.

    The projection as it is always competes, so no layer gets worse on those tokens. A bias is fitted where the
    projection has one, and by `mask+bias`.
    """
    has_bias = problem.bias is not None
    before = untuned(problem)
    best = LayerRecovery(before, "untuned", error_before := problem.error(before), error_before)
    for choice, candidate in _masks(problem, method, has_bias=has_bias):
        best = _better(best, problem, choice, candidate)
    if method in (TuneMethod.lsq, TuneMethod.auto):
        best = _descended(best, problem, ridges, with_bias=has_bias)
    return best


def _masks(problem: LayerProblem, method: TuneMethod, *, has_bias: bool) -> Iterator[tuple[str, Solution]]:
    if method in (TuneMethod.mask, TuneMethod.auto):
        yield "mask", tune_mask(problem)
    if method is TuneMethod.mask_bias or (method is TuneMethod.auto and has_bias):
        yield "mask+bias", tune_mask(problem, with_bias=True)


def _better(best: LayerRecovery, problem: LayerProblem, choice: str, candidate: Solution) -> LayerRecovery:
    error = problem.error(candidate)
    return best if error >= best.error_after else LayerRecovery(candidate, choice, best.error_before, error)


def _descended(
    best: LayerRecovery, problem: LayerProblem, ridges: Sequence[float], *, with_bias: bool
) -> LayerRecovery:
    """The best re-fit, from the middle of the ridges towards the smaller ones while they help, or else the larger."""
    answers = Refits(problem, with_bias=with_bias)
    middle = len(ridges) // 2
    errors: list[float] = []
    for way in (ridges[middle::-1], ridges[middle + 1 :]):
        for ridge in way:
            name, solution = answers.at(ridge)
            errors.append(problem.error(solution))
            if errors[-1] < best.error_after:
                best = LayerRecovery(solution, name, best.error_before, errors[-1])
            if errors[-1] > min(errors):
                break
        if len(errors) > 2:
            break  # the error fell towards the smaller ridges, so it does not fall towards the larger ones
    return best


def untuned(problem: LayerProblem) -> Solution:
    """The projection as it is."""
    return Solution(problem.weight, problem.bias)


def tune_mask(problem: LayerProblem, *, with_bias: bool = False, ridge: float = MASK_RIDGE) -> Solution:
    """One scale per input neuron, by ridge regression around 1, clipped to [0, 3].

    Args:
        with_bias: also fit the bias, by centring; the solution then always carries one.
        ridge: λ in units of the mean diagonal of the normal matrix.
    """
    sums = _explained(problem.fitting, None if with_bias else problem.bias, centred=with_bias)
    normal = _mask_normal(sums.gram, problem.weight)
    right = (sums.cross * problem.weight.T.to(sums.cross.dtype)).sum(dim=1)
    damping = ridge * normal.diagonal().mean().clamp_min(1e-30)
    residual = right - normal.sum(dim=1)
    normal.diagonal().add_(damping)
    step = _solved_in_place(normal, residual.unsqueeze(1))
    if step is None:
        normal = _mask_normal(sums.gram, problem.weight)
        normal.diagonal().add_(damping)
        step = torch.linalg.lstsq(normal, residual.unsqueeze(1)).solution
    scales = (1 + step.squeeze(1)).clamp(*MASK_RANGE).to(problem.weight.dtype)
    weight = problem.weight * scales
    return Solution(weight, _bias(problem.fitting, weight) if with_bias else problem.bias, scales)


def _mask_normal(gram: Tensor, weight: Tensor) -> Tensor:
    """(Σ w h hᵀ) ∘ (WᵀW), (k, k), beside which no second matrix of that size is made."""
    normal = gram.clone()
    for start in range(0, len(normal), _SLICE_ROWS):
        rows = slice(start, start + _SLICE_ROWS)
        normal[rows] *= weight.T[rows].to(gram.dtype) @ weight.to(gram.dtype)
    return normal


def refit(problem: LayerProblem, ridge: float, *, with_bias: bool = False) -> Solution:
    """The whole projection, by ridge regression around the weights it has.

    Args:
        ridge: λ in units of the mean diagonal of the Gram matrix.
        with_bias: also re-fit the bias; the solution then always carries one.
    """
    return Refits(problem, with_bias=with_bias).at(ridge)[1]


class Refits:
    """Re-fits of one projection with any ridge."""

    def __init__(self, problem: LayerProblem, *, with_bias: bool) -> None:
        self._problem, self._with_bias = problem, with_bias
        bias = None if with_bias else problem.bias
        self._sums = _explained(problem.fitting, bias, centred=with_bias)
        self._start = problem.weight.to(self._sums.gram.dtype)
        standing = self._sums.gram @ self._start.T
        self._right = self._sums.cross - standing
        if problem.own is not None:
            own = _explained(problem.own, bias, centred=with_bias).cross
            self._right = torch.cat([own - standing, self._sums.cross - own], dim=1)
            self._judged = _explained(problem.judging, bias, centred=with_bias)
        self._mean = float(self._sums.gram.diagonal().mean())

    def at(self, ridge: float) -> tuple[str, Solution]:
        """What the answer is called, and the answer."""
        problem, share = self._problem, 1.0
        damped = self._sums.gram.clone()
        damped.diagonal().add_(max(ridge * self._mean, 1e-30))
        changes = torch.split(_solve_positive(damped, self._right).T, len(problem.weight))
        weight = self._start + changes[0]
        if problem.own is not None:
            share = _best_share(self._judged, weight, changes[1])
            weight = weight + share * changes[1]
        found, bias = weight.to(problem.weight.dtype), problem.bias
        if self._with_bias:
            bias = _bias(problem.fitting, found)
            if problem.own is not None:
                bias = share * bias + (1 - share) * _bias(problem.own, found)
        name = f"lsq {ridge:g}" if problem.own is None else f"lsq {ridge:g}, {share:.0%} of the teacher's targets"
        return name, Solution(found, bias)


def _best_share(judging: Moments, base: Tensor, change: Tensor) -> float:
    """The share between 0 and 1 at which base + share * change, both (d, k), has the smallest error."""
    seen = change @ judging.gram
    wanted = (change * judging.cross.T).sum() - (seen * base).sum()
    curvature = (seen * change).sum()
    return float((wanted / curvature.clamp_min(1e-30)).clamp(0, 1))


def _explained(moments: Moments, bias: Tensor | None, *, centred: bool) -> Moments:
    """The sums of what the weights alone must explain: without the bias, or centred over the tokens."""
    if centred:
        mean = moments.inputs / moments.weight.to(moments.inputs.dtype)
        gram = moments.gram - torch.outer(mean, moments.inputs)
        return replace(moments, gram=gram, cross=moments.cross - torch.outer(mean, moments.targets))
    if bias is None:
        return moments
    return replace(moments, cross=moments.cross - torch.outer(moments.inputs, bias.to(moments.inputs.dtype)))


def _bias(moments: Moments, weight: Tensor) -> Tensor:
    """The bias that gives the outputs the targets' mean: (d,)."""
    total = moments.targets - weight.to(moments.inputs.dtype) @ moments.inputs
    return (total / moments.weight.to(total.dtype)).to(weight.dtype)


def _solved_in_place(matrix: Tensor, right: Tensor) -> Tensor | None:
    """Solve a symmetric positive definite system in the matrix's own memory; None if rounding has made it indefinite.

    The matrix is lost either way.
    """
    factor = matrix.mT  # by columns, as LAPACK wants it; the same matrix
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if bool(failed) else torch.cholesky_solve(right, factor)


def _solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive definite system; least squares if rounding has made it indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        fallback: Tensor = torch.linalg.lstsq(matrix, right).solution
        return fallback
    solution: Tensor = torch.cholesky_solve(right, factor)
    return solution
