"""Least squares for a handful of coefficients that cannot be negative, solved exactly and without any library."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]


def nonnegative_ridge(gram: Sequence[Sequence[float]], right: Sequence[float], center: Vector, weight: float) -> Vector:
    """The minimum over theta >= 0 of  theta^T G theta - 2 h^T theta + weight || theta - center ||^2.

    At the minimum some coefficients are zero and the others solve the normal equations among themselves; all such
    subsets are tried, which is eight for three coefficients.

    Args:
        gram: G, (k, k) symmetric and positive semi-definite; right: h, (k,).
        weight: positive, which makes the minimum unique.
    """
    size = len(right)
    matrix = [[gram[i][j] + (weight if i == j else 0.0) for j in range(size)] for i in range(size)]
    target = [right[i] + weight * center[i] for i in range(size)]
    unconstrained = solved(matrix, target)
    if min(unconstrained) >= 0:
        return unconstrained
    best, lowest = (0.0,) * size, 0.0
    for count in range(1, size):
        for free in combinations(range(size), count):
            values = solved([[matrix[i][j] for j in free] for i in free], [target[i] for i in free])
            # Where the normal equations hold, the objective is minus h^T theta.
            objective = -sum(value * target[i] for value, i in zip(values, free, strict=True))
            if min(values) >= 0 and objective < lowest:
                placed = dict(zip(free, values, strict=True))
                best, lowest = tuple(placed.get(i, 0.0) for i in range(size)), objective
    return best


def solved(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> Vector:
    """The solution of a small positive definite system, by elimination."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for pivot in range(size):
        for below in range(pivot + 1, size):
            factor = rows[below][pivot] / rows[pivot][pivot]
            rows[below] = [x - factor * y for x, y in zip(rows[below], rows[pivot], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return tuple(solution)
