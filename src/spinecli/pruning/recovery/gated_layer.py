"""Tuning both ends of a gated feed-forward layer in turns: the linear branch, then the output projection again.

Each is the exact or nearly exact answer given the other, and the pair is kept only if it is better on held-out tokens.

Re-fitting the linear branch of a gated feed-forward layer, which reaches the residual stream without a bend.

    h = s ∘ (y Uᵀ + c),   output = h Wᵀ + b          s: what the other branch lets through, times the token's weight

Given s and W the output is linear in U, so that

    min_U  ||T - output||² + λ ||U - U0||²_E

is a least-squares problem, too. Its normal matrix has channels * d_model rows and is never formed: a few steps of
preconditioned conjugate gradients apply it. E is the mean of its diagonal over each channel's row, to first order
(inferred; no source that was at hand re-fits this projection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.stream.block_stream import LoadedBlock
from spinecli.checkpoints.stream.observation import entering
from spinecli.pruning.recovery.least_squares import LayerRecovery, Solution

RIDGE = 0.03
STEPS = 4

_CHUNK_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class BranchProblem:
    """What the linear branch sees, what becomes of it, and what the layer should produce."""

    inputs: Tensor
    """y, (tokens, d_model): what enters the branch's projection."""
    gates: Tensor
    """s, (tokens, channels): what each of its outputs is multiplied with."""
    targets: Tensor
    """T, (tokens, d_model): what should leave the layer, besides its bias."""
    weight: Tensor
    """U0, (channels, d_model)."""
    bias: Tensor | None
    """c, (channels,) or None."""
    output_weight: Tensor
    """W, (d_model, channels)."""


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


# A round must lower the held-out error at least to this share of what it was.
_WORTHWHILE = 0.995


@dataclass(frozen=True)
class BranchTuning:
    """How long the two ends take turns, and on how much."""

    rounds: int = 3
    steps: int = STEPS
    tokens: int = 16_384
    """To which the branch is fitted; the output projection is fitted to all."""


@dataclass(frozen=True, eq=False)
class BranchChunk:
    """Tokens to fit the branch to."""

    inputs: Tensor
    """(tokens, d_model): what enters the branch."""
    gates: Tensor
    """(tokens, channels): what each of its outputs is multiplied with."""
    seen: Tensor
    """(tokens, channels): what enters the output projection."""
    targets: Tensor
    """(tokens, d_model): what should leave it."""
    weights: Tensor
    """(tokens,)."""


@dataclass(frozen=True, eq=False)
class BranchRecovery:
    """New weights of the linear branch, and what the output projection became with them."""

    name: str
    """Of the branch's projection, relative to the block."""
    branch: LayerRecovery
    output: LayerRecovery


def linear_branch(family: Family) -> str | None:
    """The projection that may be a gated layer's linear branch; None if there is no gate, or one fused with it."""
    return family.feed_forward.inputs[1] if len(set(family.feed_forward.inputs)) == 2 else None


@torch.no_grad()
def tune_branch(
    block: LoadedBlock,
    name: str,
    output: str,
    chunks: Iterator[BranchChunk],
    found: LayerRecovery,
    again: Callable[[], LayerRecovery],
    tuning: BranchTuning,
    dtype: torch.dtype,
) -> BranchRecovery | None:
    """Take turns until the held-out error stops falling; None if the branch is not linear or nothing helped.

    What is best so far is in the block in memory in the end.

    Args:
        block: everything before the feed-forward layer is fitted already.
        name: of the branch's projection.
        output: of the projection that its product with the gates enters.
        found: the answer that the output projection has.
        again: fits the output projection once more, to what the branch has become, and puts it in its place.
        dtype: in which weights will be stored.
    """
    branch, closing = block.linear(name), block.linear(output)
    problem = _problem(branch, closing, chunks, tuning.tokens)
    if problem is None:
        return None
    best: BranchRecovery | None = None
    for number in range(1, tuning.rounds + 1):
        problem = replace(problem, weight=branch.weight.float(), output_weight=found.solution.weight)
        before = branch.weight, closing.weight, closing.bias
        weight = refit_branch(problem, tuning.steps).to(dtype).float()
        branch.weight = nn.Parameter(weight.to(branch.weight.dtype), requires_grad=False)
        answer = again()
        if not answer.error_after < found.error_after * _WORTHWHILE:
            branch.weight, closing.weight, closing.bias = before
            break
        found = replace(answer, error_before=found.error_before)
        fitted = replace(found, solution=Solution(weight, problem.bias), choice=f"conjugate gradients, round {number}")
        best = BranchRecovery(name, fitted, found)
    return best


def _problem(branch: nn.Linear, closing: nn.Linear, chunks: Iterator[BranchChunk], tokens: int) -> BranchProblem | None:
    """The least-squares problem of the branch on the first `tokens` tokens; None if the branch is not linear."""
    weight, bias = branch.weight.detach().float(), None if branch.bias is None else branch.bias.detach().float()
    inputs: list[Tensor] = []
    gates: list[Tensor] = []
    targets: list[Tensor] = []
    seen = 0
    for chunk in chunks:
        if not inputs and not _is_linear(chunk.gates * _affine(chunk.inputs, weight, bias), chunk.seen):
            return None
        root = chunk.weights.sqrt()[:, None]
        wanted = chunk.targets if closing.bias is None else chunk.targets - closing.bias.float()
        inputs.append(chunk.inputs)
        gates.append(chunk.gates * root)
        targets.append(wanted * root)
        seen += len(chunk.inputs)
        if seen >= tokens:
            break
    found = torch.cat(inputs), torch.cat(gates), torch.cat(targets)
    return BranchProblem(*found, weight, bias, closing.weight.detach().float())


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = inputs @ weight.T
    return output if bias is None else output.add_(bias)


def branch_inputs(block: LoadedBlock, branch: str, output: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the branch, and what enters the output projection while the branch gives ones.

    Args:
        hidden: (rows, length, d_model) at the block's input.

    Returns: (tokens, d_model) and (tokens, channels).
    """
    seen: list[Tensor] = []

    def ones(_: nn.Module, inputs: tuple[Any, ...], given: Tensor) -> Tensor:
        seen.append(inputs[0].flatten(0, -2).float())
        return torch.ones_like(given)

    handle = block.linear(branch).register_forward_hook(ones)
    try:
        gates = entering(block, output, hidden)
    finally:
        handle.remove()
    return seen[0], gates


def _is_linear(predicted: Tensor, seen: Tensor) -> bool:
    """Whether what enters the output projection is the gates times the branch."""
    difference = torch.linalg.vector_norm(predicted - seen, dtype=torch.float64)
    return bool(difference <= 1e-3 * torch.linalg.vector_norm(seen, dtype=torch.float64))
