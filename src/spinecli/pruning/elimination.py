"""Optimal brain surgeon, unit by unit: the order in which units leave when the others compensate for each loss.

    error of unit u     tr( W_u [P_uu]⁻¹ W_uᵀ ),  P = (XᵀX + λI)⁻¹ over the units still there
    after u has left    W ← W - W_u [P_uu]⁻¹ P_u:       P ← P - P_:u [P_uu]⁻¹ P_u:

This is metric M4 of docs/algorithms/comp.md, evaluated again after every removal (inferred; after SlimGPT and OBS).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.01


@dataclass(frozen=True, eq=False)
class Elimination:
    """In which order units leave, and what each costs."""

    order: Tensor
    """(units,) float64: how long each unit survives, 0 for the first to leave."""
    errors: Tensor
    """(units + 1,) float64: the squared output error after the first n units have left, the others compensating."""


def eliminate(weight: Tensor, gram: Tensor, unit_size: int, step: int = 1) -> Elimination:
    """Let all units leave, the cheapest first. The Gram matrix is used up.

    Args:
        weight: (d_out, units * unit_size) of the output projection.
        gram: (units * unit_size, units * unit_size), XᵀX of its inputs.
        unit_size: neighbouring inputs that leave together.
        step: units that leave between two evaluations.
    """
    precise = gram.dtype
    units = weight.shape[1] // unit_size
    weight = weight.to("cpu", precise, copy=True)
    inverse = _damped_inverse(gram)
    alive = torch.arange(units)
    gone = torch.zeros(units, dtype=torch.bool)
    order = torch.empty(units, dtype=torch.float64)
    costs = torch.zeros(units + 1, dtype=torch.float64)
    for rank in range(0, units, step):
        errors = _unit_errors(weight, inverse, unit_size).masked_fill_(gone, torch.inf)
        leaving = torch.argsort(errors, stable=True)[: min(step, units - rank)]
        order[alive[leaving]] = torch.arange(rank, rank + len(leaving)).double()
        costs[rank + 1 : rank + 1 + len(leaving)] = errors[leaving]
        _remove(weight, inverse, _inputs_of(leaving, unit_size))
        gone[leaving] = True
        if 2 * int(gone.sum()) >= len(gone):
            staying = (~gone).nonzero().flatten()
            inputs = _inputs_of(staying, unit_size)
            weight, inverse = weight[:, inputs], inverse[inputs[:, None], inputs]
            alive, gone = alive[staying], gone[staying]
    return Elimination(order, costs.cumsum(dim=0))


def _inputs_of(units: Tensor, unit_size: int) -> Tensor:
    """Indices of the units' inputs: (n,) -> (n * unit_size,)."""
    return (units[:, None] * unit_size + torch.arange(unit_size)).flatten()


def _unit_errors(weight: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    """The squared output error that each removal leaves after compensation: (units,); undefined for those gone."""
    if unit_size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    units = weight.shape[1] // unit_size
    blocks = inverse.view(units, unit_size, units, unit_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.view(weight.shape[0], units, unit_size).permute(1, 2, 0)
    solved, _ = torch.linalg.solve_ex(blocks, parts)
    errors: Tensor = (parts * solved).sum(dim=(1, 2))
    return errors


def _remove(weight: Tensor, inverse: Tensor, leaving: Tensor) -> None:
    """Compensate weights and inverse, in place, for the inputs that leave; their rows and columns become zero."""
    cross = inverse[leaving]
    gain = torch.linalg.solve(cross[:, leaving], cross)
    weight.addmm_(weight[:, leaving], gain, alpha=-1)
    inverse.addmm_(cross.T, gain, alpha=-1)


def _damped_inverse(gram: Tensor) -> Tensor:
    """(XᵀX + λI)⁻¹, in the place of the Gram matrix."""
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    torch.linalg.cholesky(gram, out=gram)
    return torch.cholesky_inverse(gram, out=gram)
