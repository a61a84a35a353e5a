"""How fast each device is, estimated from the rounds it took part in.

MergeSFL Eq. 5 and 6, extended by a part that does not grow with the batch; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from spinecli.federation.time_model import nonnegative_ridge

RETENTION = 0.8
"""Weight of the old estimate in the moving average (alpha of Eq. 5 and 6)."""
# In observations. So light that two sizes a few per cent apart decide by themselves, heavy enough for rounding errors.
_PROPORTIONAL_WEIGHT = 1e-6


@dataclass(frozen=True)
class Pace:
    """What an iteration takes a device; plain numbers that `dataclasses.asdict` stores.

    Raises: ValueError if a figure is negative or not finite.
    """

    compute_seconds: float
    """mu: forward and backward through the bottom, a row."""
    transfer_seconds: float
    """beta: features up and gradients down, a row."""
    fixed_seconds: float = 0.0
    """e: an iteration, whatever its batch."""

    def __post_init__(self) -> None:
        if not all(0 <= figure < math.inf for figure in astuple(self)):
            raise ValueError(f"{self} has a figure that is negative or not finite.")

    @property
    def row_seconds(self) -> float:
        """Of computing and transferring one row, mu + beta."""
        return self.compute_seconds + self.transfer_seconds

    def updated(self, observed: Pace, retention: float = RETENTION) -> Pace:
        """The exponential moving average: retention * old + (1 - retention) * observed, figure by figure."""
        pairs = zip(astuple(self), astuple(observed), strict=True)
        return Pace(*(retention * old + (1 - retention) * new for old, new in pairs))


@dataclass(frozen=True)
class Transfer:
    """One message in one direction."""

    bytes: int
    seconds: float

    @property
    def plausible(self) -> bool:
        """Whether it can be learned from."""
        return self.bytes >= 0 and 0 <= self.seconds < math.inf


@dataclass(frozen=True)
class Iteration:
    """One iteration of one device, as the server sees it."""

    rows: int
    compute_seconds: float
    upload: Transfer
    """Its features."""
    download: Transfer
    """Their gradients."""

    @property
    def plausible(self) -> bool:
        """Whether it can be learned from."""
        return (
            self.rows >= 1
            and 0 <= self.compute_seconds < math.inf
            and self.upload.plausible
            and self.download.plausible
        )


def observed_pace(
    iterations: Sequence[Iteration], uploads: Sequence[Transfer] = (), downloads: Sequence[Transfer] = ()
) -> Pace | None:
    """The pace that explains one round of one device; None if the round tells nothing.

        seconds of a message = latency + bytes * rate,      latency, rate >= 0, least squares, for each direction
        mu = sum of compute seconds / sum of rows
        beta = feature bytes a row * rate up + gradient bytes a row * rate down
        e = latency up + latency down

    Args:
        uploads: further messages in this direction, such as the bottom at the end of the round; being of another size
            they tell latency from rate.
        downloads: likewise, such as the bottom at the start.

    Iterations without rows and times that are negative or not finite are passed over.
    """
    seen = [iteration for iteration in iterations if iteration.plausible]
    rows = sum(iteration.rows for iteration in seen)
    if not seen:
        return None
    sent, received = [iteration.upload for iteration in seen], [iteration.download for iteration in seen]
    latency_up, rate_up = _line([*sent, *(each for each in uploads if each.plausible)])
    latency_down, rate_down = _line([*received, *(each for each in downloads if each.plausible)])
    figures = (
        sum(iteration.compute_seconds for iteration in seen) / rows,
        sum(each.bytes for each in sent) / rows * rate_up + sum(each.bytes for each in received) / rows * rate_down,
        latency_up + latency_down,
    )
    # Absurd but finite times can overflow in their sums.
    return Pace(*figures) if all(math.isfinite(figure) for figure in figures) else None


def paces_of(known: Mapping[str, Pace], devices: Sequence[tuple[str, str]]) -> list[Pace] | None:
    """A pace for each device, given as (name, class); None if nobody is known.

    A device never observed counts as the mean of the known ones of its class, or of all where its class has none.
    Who is known but not among the devices tells nothing.
    """
    by_class: dict[str, list[Pace]] = {}
    for name, device_class in devices:
        if name in known:
            by_class.setdefault(device_class, []).append(known[name])
    if not by_class:
        return None
    means = {device_class: _mean(paces) for device_class, paces in by_class.items()}
    overall = _mean([pace for paces in by_class.values() for pace in paces])
    return [known.get(name) or means.get(device_class, overall) for name, device_class in devices]


@dataclass(frozen=True, eq=False)
class Paces:
    """The paces of many devices, as vectors."""

    row_seconds: Tensor
    """mu + beta, (devices,) float64."""
    fixed_seconds: Tensor
    """e, (devices,) float64."""

    @classmethod
    def of(cls, paces: Sequence[Pace]) -> Paces:
        """Stack."""
        return cls(
            torch.tensor([pace.row_seconds for pace in paces], dtype=torch.float64),
            torch.tensor([pace.fixed_seconds for pace in paces], dtype=torch.float64),
        )

    def of_cohort(self, cohort: Tensor) -> Paces:
        """Those at the indices `cohort`."""
        return Paces(self.row_seconds[cohort], self.fixed_seconds[cohort])

    def durations(self, batches: Tensor) -> Tensor:
        """Seconds of one iteration with these batches: d (mu + beta) + e, (devices,) float64."""
        return batches.double() * self.row_seconds + self.fixed_seconds


def _line(transfers: Sequence[Transfer]) -> tuple[float, float]:
    """(latency in seconds, seconds a byte).

    Drawn very lightly toward latency 0 and time in proportion to size, which decides where all sizes are equal.
    """
    largest = max(transfer.bytes for transfer in transfers) or 1
    sizes = [transfer.bytes / largest for transfer in transfers]
    seconds = [transfer.seconds for transfer in transfers]
    square, product = sum(x * x for x in sizes), sum(x * y for x, y in zip(sizes, seconds, strict=True))
    proportional = product / square if square else 0.0
    latency, slope = nonnegative_ridge(
        ((len(sizes), sum(sizes)), (sum(sizes), square)),
        (sum(seconds), product),
        (0.0, proportional),
        _PROPORTIONAL_WEIGHT,
    )
    return latency, slope / largest


def _mean(paces: Sequence[Pace]) -> Pace:
    columns = zip(*(astuple(pace) for pace in paces), strict=True)
    return Pace(*(math.fsum(column) / len(paces) for column in columns))
