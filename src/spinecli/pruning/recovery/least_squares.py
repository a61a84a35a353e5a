"""Closed-form recovery of one output projection.

The student's projection sees inputs H and should produce targets T. Three kinds of answer, all linear least squares:

    mask   min_m  ||T - H diag(m) W0ᵀ||²        one scale per input, (WᵀW) ∘ (HᵀH) as normal matrix
    refit  min_W  ||T - H Wᵀ||² + λ||W - W0||²  the whole projection, drawn toward the weights it has
    bias   on top of either, by centring H and T over the tokens

That COMP tunes its masks so is inferred (after Kwon et al. 2022); see docs/algorithms/comp.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.pruning.config import TuneMethod

# Up to this size normal equations are summed and solved in float64; above it, their size matters more.
_DOUBLE_SIZE = 4096
_CHUNK_TOKENS = 4096
_SLICE_ROWS = 4096

MASK_RIDGE = 0.01
MASK_RANGE = (0.0, 3.0)


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """What one output projection sees and should produce."""

    inputs: Tensor
    """H, (tokens, k): what enters the student's projection."""
    targets: Tensor
    """T, (tokens, d_model): what should leave it, its present bias not subtracted."""
    weight: Tensor
    """W0, (d_model, k): the weights it has."""
    bias: Tensor | None
    """(d_model,) or None."""

    def rows(self, start: int, stop: int) -> LayerProblem:
        """The same layer on the tokens from `start` to `stop`."""
        return LayerProblem(self.inputs[start:stop], self.targets[start:stop], self.weight, self.bias)

    def output(self, solution: Solution) -> Tensor:
        """What leaves the projection under `solution`: (tokens, d_model)."""
        output = self.inputs @ solution.weight.T
        return output if solution.bias is None else output.add_(solution.bias)

    def relative_error(self, solution: Solution) -> float:
        """||T - output||² / ||T||²."""
        difference = torch.linalg.vector_norm(self.targets - self.output(solution), dtype=torch.float64)
        whole = torch.linalg.vector_norm(self.targets, dtype=torch.float64)
        return float((difference / whole.clamp_min(1e-300)) ** 2)


@dataclass(frozen=True, eq=False)
class Solution:
    """New weights of one projection, the scales already folded in."""

    weight: Tensor
    """(d_model, k)."""
    bias: Tensor | None
    """(d_model,) or None."""
    scales: Tensor | None = None
    """(k,) if the solution is a mask; None if the projection was re-fitted or left alone."""

    def rounded(self, dtype: torch.dtype) -> Solution:
        """The solution as it will be stored, so that later blocks are tuned against what is really there."""
        bias = None if self.bias is None else self.bias.to(dtype).to(self.bias.dtype)
        return Solution(self.weight.to(dtype).to(self.weight.dtype), bias, self.scales)


def untuned(problem: LayerProblem) -> Solution:
    """The projection as it is."""
    return Solution(problem.weight, problem.bias)


def tune_mask(problem: LayerProblem, *, with_bias: bool = False, ridge: float = MASK_RIDGE) -> Solution:
    """One scale per input neuron, by ridge regression around 1, clipped to [0, 3].

    Args:
        with_bias: also fit the bias, by centring; the solution then always carries one.
        ridge: λ in units of the mean diagonal of the normal matrix.
    """
    inputs_mean, targets = _centred(problem, with_bias)
    k = problem.weight.shape[1]
    precise = _precision(k)
    normal = _mask_normal(problem, inputs_mean, precise)
    right = torch.zeros(k, dtype=precise, device=normal.device)
    for inputs, chunk_targets in _chunks(problem.inputs, targets, inputs_mean):
        right += (inputs * (chunk_targets @ problem.weight.to(chunk_targets.dtype))).sum(dim=0, dtype=precise)
    damping = ridge * normal.diagonal().mean().clamp_min(1e-30)
    residual = right - normal.sum(dim=1)
    normal.diagonal().add_(damping)
    step = _solved_in_place(normal, residual.unsqueeze(1))
    if step is None:
        normal = _mask_normal(problem, inputs_mean, precise)
        normal.diagonal().add_(damping)
        step = torch.linalg.lstsq(normal, residual.unsqueeze(1)).solution
    scales = (1 + step.squeeze(1)).clamp(*MASK_RANGE)
    scales = scales.to(problem.weight.dtype)
    weight = problem.weight * scales
    return Solution(weight, _bias(problem, weight, inputs_mean), scales)


def _mask_normal(problem: LayerProblem, inputs_mean: Tensor | None, precise: torch.dtype) -> Tensor:
    """(HᵀH) ∘ (WᵀW), (k, k), of which no second matrix of that size is made."""
    normal = _gram(problem.inputs, inputs_mean, precise)
    for start in range(0, len(normal), _SLICE_ROWS):
        rows = slice(start, start + _SLICE_ROWS)
        normal[rows] *= problem.weight.T[rows].to(precise) @ problem.weight.to(precise)
    return normal


def refit(problem: LayerProblem, ridge: float, *, with_bias: bool = False) -> Solution:
    """The whole projection, by ridge regression around the weights it has.

    Solved in the smaller of two equivalent forms: over the inputs (k x k), or over the tokens when they are fewer.

    Args:
        ridge: λ in units of the mean diagonal of HᵀH.
        with_bias: also re-fit the bias; the solution then always carries one.
    """
    [(_, solution)] = refits(problem, (ridge,), with_bias=with_bias)
    return solution


def refits(
    problem: LayerProblem, ridges: tuple[float, ...], *, with_bias: bool = False
) -> Iterator[tuple[float, Solution]]:
    """`refit` for several ridges one after the other, with the Gram matrix summed once: (ridge, solution) pairs."""
    inputs_mean, targets = _centred(problem, with_bias)
    tokens, k = problem.inputs.shape
    over_tokens = tokens < k
    precise = _precision(min(tokens, k))
    inputs = problem.inputs if inputs_mean is None else problem.inputs - inputs_mean
    error = targets - inputs @ problem.weight.T
    if over_tokens:
        gram = inputs.to(precise) @ inputs.T.to(precise)
        right = error.to(precise)
    else:
        gram = _gram(inputs, None, precise)
        right = torch.zeros(k, error.shape[1], dtype=precise, device=error.device)
        for chunk, chunk_error in _chunks(inputs, error, None):
            right += chunk.T @ chunk_error
    mean_diagonal = float(gram.diagonal().sum()) / k
    for ridge in ridges:
        damped = gram.clone()
        damped.diagonal().add_(max(ridge * mean_diagonal, 1e-30))
        solved = _solve_positive(damped, right)
        change = solved.T.to(problem.weight.dtype) @ inputs if over_tokens else solved.T.to(problem.weight.dtype)
        weight = problem.weight + change
        yield ridge, Solution(weight, _bias(problem, weight, inputs_mean))


def _precision(size: int) -> torch.dtype:
    return torch.float64 if size <= _DOUBLE_SIZE else torch.float32


def _centred(problem: LayerProblem, with_bias: bool) -> tuple[Tensor | None, Tensor]:
    """(mean of H or None, the targets that the weights alone must explain)."""
    if with_bias:
        return problem.inputs.mean(dim=0), problem.targets - problem.targets.mean(dim=0)
    return None, problem.targets if problem.bias is None else problem.targets - problem.bias


def _bias(problem: LayerProblem, weight: Tensor, inputs_mean: Tensor | None) -> Tensor | None:
    if inputs_mean is None:
        return problem.bias
    return problem.targets.mean(dim=0) - weight @ inputs_mean


def _chunks(inputs: Tensor, others: Tensor, mean: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(inputs), _CHUNK_TOKENS):
        chunk = inputs[start : start + _CHUNK_TOKENS]
        other = others[start : start + _CHUNK_TOKENS]
        yield _at_least_single(chunk if mean is None else chunk - mean), _at_least_single(other)


def _at_least_single(value: Tensor) -> Tensor:
    """Halves as float32: sums of their products over thousands of tokens would overflow or lose what matters."""
    return value.float() if value.dtype.itemsize < 4 else value


def _gram(inputs: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(H - mean)ᵀ(H - mean), (k, k), summed over chunks in `dtype`."""
    k = inputs.shape[1]
    total = torch.zeros(k, k, dtype=dtype, device=inputs.device)
    for chunk, _ in _chunks(inputs, inputs, mean):
        if chunk.dtype == dtype:
            total.addmm_(chunk.T, chunk)
        else:
            total += chunk.T @ chunk
    return total


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


RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_MIDDLING_RIDGE = 0.03


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
