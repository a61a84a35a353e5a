"""Optimal brain surgeon, unit by unit: which inputs of a projection can leave while the others take over their work.

    error of unit u     tr( W_u [P_uu]⁻¹ W_uᵀ ),                    P = (XᵀX + λI)⁻¹
    after u has left    W ← W - W_u [P_uu]⁻¹ P_u:        P ← P - P_:u [P_uu]⁻¹ P_u:

Sourced: optimal brain surgeon. That units leave greedily, several channels at a time, is inferred, see
docs/algorithms/comp.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.01

# Channels that leave between two evaluations: fewer at a time costs more and hardly changes the order.
_SINGLE_STEP = 8
_EVALUATIONS = 96


@dataclass(frozen=True, eq=False)
class Elimination:
    """In which order units leave, and what each costs."""

    order: Tensor
    """(units,) float64: how long each unit survives, 0 for the first to leave; those that stay come last, by what their
    loss would cost."""
    errors: Tensor
    """(units + 1,) float64: the squared output error after the first n units have left, the others compensating; of as
    many as have left."""


def eliminate(weight: Tensor, gram: Tensor, unit_size: int, *, stay: int = 0, step: int | None = None) -> Elimination:
    """Let units leave, the cheapest first. The Gram matrix is used up.

    Args:
        weight: (d_out, units * unit_size) of the output projection.
        gram: (units * unit_size, units * unit_size), XᵀX of its inputs.
        unit_size: neighbouring inputs that leave together.
        stay: units that do not leave.
        step: units that leave between two evaluations; by default one of several inputs, and of single inputs so many
            that there are at most 96 evaluations.
    """
    units = weight.shape[1] // unit_size
    if step is None:
        step = max(_SINGLE_STEP, units // _EVALUATIONS) if unit_size == 1 else 1
    leaving_at_all = units - stay
    weight = weight.to("cpu", gram.dtype, copy=True)
    inverse = _damped_inverse(gram)
    alive = torch.arange(units)
    gone = torch.zeros(units, dtype=torch.bool)
    order = torch.empty(units, dtype=torch.float64)
    costs = torch.zeros(leaving_at_all + 1, dtype=torch.float64)
    for rank in range(0, leaving_at_all, step):
        errors = _unit_errors(weight, inverse, unit_size).masked_fill_(gone, torch.inf)
        leaving = torch.argsort(errors, stable=True)[: min(step, leaving_at_all - rank)]
        order[alive[leaving]] = torch.arange(rank, rank + len(leaving)).double()
        costs[rank + 1 : rank + 1 + len(leaving)] = errors[leaving]
        _remove(weight, inverse, _inputs_of(leaving, unit_size))
        gone[leaving] = True
        if 2 * int(gone.sum()) >= len(gone):
            weight, inverse, alive, gone = _without(weight, inverse, alive, gone, unit_size)
    if stay:
        weight, inverse, alive, gone = _without(weight, inverse, alive, gone, unit_size)
        lasting = torch.argsort(_unit_errors(weight, inverse, unit_size), stable=True)
        order[alive[lasting]] = torch.arange(leaving_at_all, units).double()
    return Elimination(order, costs.cumsum(dim=0))


def _without(
    weight: Tensor, inverse: Tensor, alive: Tensor, gone: Tensor, unit_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same without the rows and columns of the units that have left."""
    staying = (~gone).nonzero().flatten()
    inputs = _inputs_of(staying, unit_size)
    return weight[:, inputs], inverse[inputs[:, None], inputs], alive[staying], gone[staying]


def _inputs_of(units: Tensor, unit_size: int) -> Tensor:
    """Indices of the units' inputs: (n,) -> (n * unit_size,)."""
    return (units[:, None] * unit_size + torch.arange(unit_size)).flatten()


def _unit_errors(weight: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    """The squared output error that each removal leaves after compensation: (units,); undefined for those gone."""
    if unit_size == 1:
        return weight.square().sum(dim=0).double() / inverse.diagonal().double()
    units = weight.shape[1] // unit_size
    blocks = inverse.view(units, unit_size, units, unit_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.view(weight.shape[0], units, unit_size).permute(1, 2, 0)
    solved, _ = torch.linalg.solve_ex(blocks, parts)
    errors: Tensor = (parts * solved).sum(dim=(1, 2)).double()
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
