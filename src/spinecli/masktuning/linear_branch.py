"""Re-fitting the linear branch of a gated feed-forward layer, which reaches the residual stream without a bend.

    h = s ∘ (y Uᵀ + c),   output = h Wᵀ + b          s: what the other branch lets through

Given s and W the output is linear in U, so that

    min_U  ||T - output||² + λ ||U - U0||²_E

is a least-squares problem, too. Its normal matrix has channels * d_model rows and is never formed: a few steps of
preconditioned conjugate gradients apply it. E is the mean of its diagonal over each channel's row, to first order
(inferred; no source that was at hand re-fits this projection).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.03
STEPS = 5

_CHUNK_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class BranchProblem:
    """What the linear branch sees, what becomes of it, and what the layer should produce."""

    inputs: Tensor
    """y, (tokens, d_model): what enters the branch's projection."""
    gates: Tensor
    """s, (tokens, channels): what each of its outputs is multiplied with."""
    targets: Tensor
    """T, (tokens, d_model): what should leave the layer, its bias not subtracted."""
    weight: Tensor
    """U0, (channels, d_model)."""
    bias: Tensor | None
    """c, (channels,) or None."""
    output_weight: Tensor
    """W, (d_model, channels)."""
    output_bias: Tensor | None
    """b, (d_model,) or None."""


def refit_branch(problem: BranchProblem, steps: int = STEPS, ridge: float = RIDGE) -> Tensor:
    """U after `steps` of conjugate gradients from U0: (channels, d_model).

    Beside U0 it holds four matrices of that size, which for a large model are most of a run's memory.

    Args:
        ridge: λ, in units of E.
    """
    inputs_square, gates_square = _mean_squares(problem.inputs), _mean_squares(problem.gates)
    strength = gates_square * problem.output_weight.square().sum(dim=0) * len(problem.inputs)
    damping = (ridge * inputs_square.mean() * strength)[:, None]
    # D plus the damping is an outer product, and so is its inverse
    by_channel = 1 / strength.clamp_min(1e-30)[:, None]
    by_input = 1 / (inputs_square + ridge * inputs_square.mean()).clamp_min(1e-30)
    change = torch.zeros_like(problem.weight)
    residual = _first_residual(problem)
    direction = residual * by_channel
    direction *= by_input
    size = _inner(residual, direction)
    rounding = size * torch.finfo(direction.dtype).eps ** 2
    image = torch.empty_like(direction)
    for _ in range(steps):
        _normal_product(problem, direction, image).addcmul_(damping, direction)
        curvature = _inner(direction, image)
        if size <= rounding or not curvature > 0:
            break  # nothing is left to explain
        length = size / curvature
        change.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        steered = torch.mul(residual, by_channel, out=image).mul_(by_input)
        following = _inner(residual, steered)
        direction.mul_(following / size).add_(steered)
        size = following
    return change.add_(problem.weight)


def _inner(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten(), other.flatten()))


def _first_residual(problem: BranchProblem) -> Tensor:
    """Aᵀ (T - output of U0), (channels, d_model)."""
    total = torch.zeros_like(problem.weight)
    for inputs, gates, targets in _chunks(problem.inputs, problem.gates, problem.targets):
        hidden = inputs @ problem.weight.T
        if problem.bias is not None:
            hidden += problem.bias
        error = targets - (gates * hidden) @ problem.output_weight.T
        if problem.output_bias is not None:
            error -= problem.output_bias
        total.addmm_((gates * (error @ problem.output_weight)).T, inputs)
    return total


def _normal_product(problem: BranchProblem, direction: Tensor, total: Tensor) -> Tensor:
    """AᵀA applied to a change of U, (channels, d_model), into `total`."""
    total.zero_()
    for inputs, gates in _chunks(problem.inputs, problem.gates):
        output = (gates * (inputs @ direction.T)) @ problem.output_weight.T
        total.addmm_((gates * (output @ problem.output_weight)).T, inputs)
    return total


def _mean_squares(values: Tensor) -> Tensor:
    """(tokens, n) -> (n,)."""
    total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    for (chunk,) in _chunks(values):
        total += chunk.square().sum(dim=0, dtype=torch.float64)
    mean: Tensor = (total / len(values)).to(values.dtype)
    return mean


def _chunks(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(value, _CHUNK_TOKENS) for value in values), strict=True)
