"""Tuning both ends of a gated feed-forward layer in turns: the linear branch, then the output projection again.

Each is the exact or nearly exact answer given the other, and the pair is kept only if it is better on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spinecli.calibration.observation import projection_inputs
from spinecli.calibration.stream import BlockStream, LoadedBlock
from spinecli.masktuning.least_squares import LayerProblem, Solution
from spinecli.masktuning.linear_branch import BranchProblem, refit_branch
from spinecli.masktuning.recovery import LayerRecovery

# A round must lower the held-out error at least to this share of what it was.
_WORTHWHILE = 0.995


@dataclass(frozen=True)
class BranchTuning:
    """How long the two ends take turns."""

    held_out: int
    """Tokens at the end that judge and are not fitted to."""
    rounds: int = 3


@dataclass(frozen=True, eq=False)
class BranchRecovery:
    """New weights of the linear branch, and what the output projection became with them."""

    name: str
    """Of the branch's projection, relative to the block."""
    branch: LayerRecovery
    output: LayerRecovery
    added: Tensor
    """(tokens, d_model): what leaves the layer."""


@torch.no_grad()
def tune_branch(
    stream: BlockStream,
    block: LoadedBlock,
    hidden: Tensor,
    targets: Tensor,
    found: LayerRecovery,
    answer: Callable[[LayerProblem], LayerRecovery],
    tuning: BranchTuning,
    dtype: torch.dtype,
) -> BranchRecovery | None:
    """Take turns until the held-out error stops falling; None if the layer has no linear branch or nothing helped.

    Args:
        hidden: (rows, length, d_model) at the block's input; everything before the feed-forward layer is tuned already.
        targets: (tokens, d_model), what should leave the feed-forward layer.
        found: the answer that the output projection has.
        answer: solves the output projection.
        dtype: in which weights will be stored.
    """
    family = stream.checkpoint.family
    if len(set(family.feed_forward.inputs)) != 2:
        return None  # no gate, or one that is fused with the branch
    name = family.feed_forward.inputs[1]
    linear = block.linear(name)
    inputs = projection_inputs(stream, block, name, hidden)
    gates = _gates(stream, block, name, family.feed_forward.output, hidden)
    bias = None if linear.bias is None else linear.bias.detach().float()
    weight = linear.weight.detach().float()
    seen = projection_inputs(stream, block, family.feed_forward.output, hidden[:1])
    if not _is_linear(gates[: len(seen)] * _affine(inputs[: len(seen)], weight, bias), seen):
        return None
    fitted = len(inputs) - tuning.held_out
    best: BranchRecovery | None = None
    for number in range(1, tuning.rounds + 1):
        problem = BranchProblem(
            inputs[:fitted],
            gates[:fitted],
            targets[:fitted],
            weight,
            bias,
            found.solution.weight,
            found.solution.bias,
        )
        weight = refit_branch(problem).to(dtype).float()
        layer = LayerProblem(gates * _affine(inputs, weight, bias), targets, found.solution.weight, found.solution.bias)
        again = answer(layer)
        if not again.error_after < found.error_after * _WORTHWHILE:
            break
        found = replace(again, solution=again.solution.rounded(dtype), error_before=found.error_before)
        branch = replace(found, solution=Solution(weight, bias), choice=f"conjugate gradients, round {number}")
        best = BranchRecovery(name, branch, found, layer.output(found.solution))
    return best


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = inputs @ weight.T
    return output if bias is None else output.add_(bias)


def _gates(stream: BlockStream, block: LoadedBlock, branch: str, output: str, hidden: Tensor) -> Tensor:
    """What enters the output projection while the branch gives ones: (tokens, channels)."""

    def ones(_: nn.Module, __: tuple[Any, ...], given: Tensor) -> Tensor:
        return torch.ones_like(given)

    handle = block.linear(branch).register_forward_hook(ones)
    try:
        return projection_inputs(stream, block, output, hidden)
    finally:
        handle.remove()


def _is_linear(predicted: Tensor, seen: Tensor) -> bool:
    """Whether what enters the output projection is the gates times the branch."""
    difference = torch.linalg.vector_norm(predicted - seen, dtype=torch.float64)
    return bool(difference <= 1e-3 * torch.linalg.vector_norm(seen, dtype=torch.float64))
