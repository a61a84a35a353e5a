"""How long a round takes on each device, learned from nothing but past completion times.

    T_i = a_i (1 - p) + b_i r / r_max + e_i,     a_i, b_i, e_i >= 0

p is the pruning ratio and r the LoRA rank. The model and its use are this project's, not FedSpine's; see
docs/algorithms/fedspine.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pydantic import Field

from spinecli.artifacts.record import Record

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


_FITTING_TURNS = 20
_EQUAL_PARTS: Vector = (1 / 3, 1 / 3, 1 / 3)


class TimeSums(Record):
    """What recursive least squares with forgetting remembers of one device."""

    visits: int = 0
    gram: Matrix = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    """G = sum lambda^age x x^T."""
    right: Vector = (0.0, 0.0, 0.0)
    """h = sum lambda^age x T, in seconds."""

    def with_visit(self, x: Vector, seconds: float, keep: float) -> TimeSums:
        """After one more completion time; everything older counts `keep` times what it did."""
        return TimeSums(
            visits=self.visits + 1,
            gram=tuple(
                tuple(keep * old + left * right for old, right in zip(row, x, strict=True))
                for row, left in zip(self.gram, x, strict=True)
            ),
            right=tuple(keep * old + value * seconds for old, value in zip(self.right, x, strict=True)),
        )

    def scale(self, shape: Vector) -> float:
        """The factor by which `shape` fits the completion times best: phi^T h / phi^T G phi."""
        return _dot(shape, self.right) / sum(
            part * _dot(row, shape) for part, row in zip(shape, self.gram, strict=True)
        )


class TimeModelState(Record):
    """All that was learned, by device; written as JSON and read again, it predicts the same to the last bit."""

    devices: dict[str, TimeSums] = Field(default_factory=dict)


@dataclass(frozen=True)
class _Fit:
    """Coefficients (a, b, e) in seconds."""

    unseen: Vector
    devices: Mapping[str, Vector]


class TimeModel:
    """Completion times of a whole fleet.

    Devices have one shape phi in common, and a scale s_i each. A device's own coefficients are drawn toward s_i phi as
    if by `prior` observations of each: one visit is enough for a sane prediction, and many decide by themselves.

        (G_i + prior I) theta_i = h_i + prior s_i phi,     theta_i >= 0

    Because no coefficient is negative, no prediction is, and however far from what was seen, a smaller model is never
    predicted to be slower, nor a higher rank to be faster.
    """

    def __init__(
        self, largest_rank: int, keep: float = 0.8, prior: float = 0.1, state: TimeModelState | None = None
    ) -> None:
        """A model that has seen what is in `state`, if anything.

        Args:
            largest_rank: the unit in which ranks are counted.
            keep: what an observation is worth after one more visit to the same device (lambda).
            prior: weight of the fleet's shape, in observations.
        """
        if largest_rank < 1 or not 0 < keep <= 1 or not prior > 0:
            raise ValueError("The largest rank and the prior must be positive, and what is kept in (0, 1].")
        self._largest_rank = largest_rank
        self._keep = keep
        self._prior = prior
        self._devices = dict(state.devices) if state else {}
        self._fitted: _Fit | None = None

    @property
    def state(self) -> TimeModelState:
        """For `TimeModel(..., state=state)` to go on from."""
        return TimeModelState(devices=dict(self._devices))

    def observe(self, device: str, ratio: float, rank: int, seconds: float) -> None:
        """Take in a completion time. ValueError if it is not a finite positive number."""
        if not 0 < seconds < float("inf"):
            raise ValueError(f"A completion time is {seconds} s; it must be finite and positive.")
        sums = self._devices.get(device, TimeSums())
        self._devices[device] = sums.with_visit(self._features(ratio, rank), seconds, self._keep)
        self._fitted = None

    def visits(self, device: str) -> int:
        """How often the device has been observed."""
        return self._devices.get(device, TimeSums()).visits

    def seconds(self, device: str, ratio: float, rank: int) -> float:
        """The predicted completion time; the fleet's mean for a device never seen. Arbitrary units before any visit."""
        return _dot(self.coefficients(device), self._features(ratio, rank))

    def coefficients(self, device: str) -> Vector:
        """(a, b, e) in seconds: for the whole unpruned model, for the largest rank, and whatever is chosen."""
        if self._fitted is None:
            self._fitted = self._fit()
        return self._fitted.devices.get(device, self._fitted.unseen)

    def _features(self, ratio: float, rank: int) -> Vector:
        return (1 - ratio, rank / self._largest_rank, 1.0)

    def _fit(self) -> _Fit:
        # in one order, whenever the devices were seen: a resumed run has lost that, and sums depend on it
        shape, scales = shared_shape(dict(sorted(self._devices.items())), self._prior)
        mean = sum(scales.values()) / len(scales) if scales else 1.0
        devices = {
            name: nonnegative_ridge(sums.gram, sums.right, _times(shape, scales[name]), self._prior)
            for name, sums in self._devices.items()
        }
        return _Fit(_times(shape, mean), devices)


def shared_shape(devices: Mapping[str, TimeSums], prior: float) -> tuple[Vector, dict[str, float]]:
    """The shape phi that all devices have in common, parts that sum to 1, and each device's scale.

        phi = argmin over phi >= 0 of  sum_i || T_i / s_i - X_i phi ||^2 + prior || phi - (1/3, 1/3, 1/3) ||^2
        s_i = phi^T h_i / phi^T G_i phi

    in turns. Without the scales, slow devices, which a planner gives low ranks, would make low ranks look slow.
    """
    shape = _EQUAL_PARTS
    scales = {name: sums.scale(shape) for name, sums in devices.items()}
    if not devices:
        return shape, scales
    gram = [[sum(sums.gram[i][j] for sums in devices.values()) for j in range(3)] for i in range(3)]
    for _ in range(_FITTING_TURNS):
        right = [sum(sums.right[i] / scales[name] for name, sums in devices.items()) for i in range(3)]
        shape = nonnegative_ridge(gram, right, _EQUAL_PARTS, prior)
        shape = _times(shape, 1 / sum(shape))
        scales = {name: sums.scale(shape) for name, sums in devices.items()}
    return shape, scales


def _dot(one: Vector, other: Vector) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def _times(vector: Vector, factor: float) -> Vector:
    return tuple(value * factor for value in vector)
