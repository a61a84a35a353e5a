"""Optimal brain surgeon, unit by unit: the order in which units leave when the others compensate for each loss.

    error of unit u     tr( W_u [P_uu]⁻¹ W_uᵀ ),  P = (XᵀX + λI)⁻¹ over the units still there
    after u has left    W ← W - W_u [P_uu]⁻¹ P_u:       P ← P - P_:u [P_uu]⁻¹ P_u:

This is metric M4 of docs/algorithms/comp.md, evaluated again after every removal (inferred; after SlimGPT and OBS).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.01


def elimination_order(weight: Tensor, gram: Tensor, unit_size: int, step: int = 1) -> Tensor:
    """How long each unit survives: (units,) float64, 0 for the first to leave. The Gram matrix is used up.

    Args:
        weight: (d_out, units * unit_size) of the output projection.
        gram: (units * unit_size, units * unit_size), XᵀX of its inputs.
        unit_size: neighbouring inputs that leave together.
        step: units that leave between two evaluations.
    """
    precise = gram.dtype
    units = weight.shape[1] // unit_size
    weight = weight.to("cpu", precise)
    inverse = _damped_inverse(gram)
    alive = torch.arange(units)
    order = torch.empty(units, dtype=torch.float64)
    while len(alive):
        errors = _unit_errors(weight, inverse, unit_size)
        leaving = torch.argsort(errors, stable=True)[:step]
        order[alive[leaving]] = torch.arange(units - len(alive), units - len(alive) + len(leaving)).double()
        staying = torch.ones(len(alive), dtype=torch.bool)
        staying[leaving] = False
        weight, inverse = _without(weight, inverse, staying.repeat_interleave(unit_size))
        alive = alive[staying]
    return order


def _unit_errors(weight: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    """The squared output error that each unit's removal leaves after compensation: (units,)."""
    if unit_size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    units = weight.shape[1] // unit_size
    blocks = inverse.view(units, unit_size, units, unit_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.view(weight.shape[0], units, unit_size).permute(1, 2, 0)
    errors: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2))
    return errors


def _without(weight: Tensor, inverse: Tensor, staying: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and inverse of the columns that stay, compensated for those that leave."""
    cross = inverse[~staying][:, staying]
    gain = torch.linalg.solve(inverse[~staying][:, ~staying], cross)
    kept = inverse[staying][:, staying].addmm_(cross.T, gain, alpha=-1)
    return weight[:, staying].addmm_(weight[:, ~staying], gain, alpha=-1), kept


def _damped_inverse(gram: Tensor) -> Tensor:
    """(XᵀX + λI)⁻¹, in place of the Gram matrix where that saves a copy."""
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    factor = torch.linalg.cholesky(gram, out=gram)
    return torch.cholesky_inverse(factor)
