"""How fast each device is, estimated from the rounds it took part in.

MergeSFL Eq. 5 and 6, extended by a part that does not grow with the batch; see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

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


def label_distributions(counts: Tensor) -> Tensor:
    """V: the share of each label on each device, (devices, labels) float64, from counts of the same shape.

    Raises: ValueError if a count is negative or a device has no examples.
    """
    totals = counts.double().sum(dim=1, keepdim=True)
    if bool((counts < 0).any()) or bool((totals <= 0).any()):
        raise ValueError("Every device needs at least one example, and no count may be negative.")
    return counts.double() / totals


def reference_distribution(distributions: Tensor) -> Tensor:
    """Phi_0 = (1/N) sum_i V_i of Eq. 12, (labels,): every device counts the same, however many examples it has."""
    return distributions.mean(dim=0)


def merged_distribution(batches: Tensor, distributions: Tensor) -> Tensor:
    """Phi_S = sum_i d_i V_i / sum_i d_i of Eq. 11, (..., labels) float64.

    Args:
        batches: d, (..., devices), at least one row in each cohort; 0 for who does not take part.
        distributions: V, (devices, labels).
    """
    rows = batches.double()
    return rows @ distributions / rows.sum(dim=-1, keepdim=True)


def divergence(distributions: Tensor, reference: Tensor) -> Tensor:
    """KL(Phi || Phi_0) = sum_y Phi(y) log(Phi(y) / Phi_0(y)) in nats, (...) from (..., labels), with 0 log 0 = 0.

    Infinite where Phi has a label that Phi_0 lacks, which cannot be if Phi_0 is the mean over all devices.
    """
    terms = torch.xlogy(distributions, distributions) - torch.xlogy(distributions, reference)
    # Rounding can leave equal distributions just below zero.
    return terms.sum(dim=-1).clamp(min=0.0)


_ANY_ROWS = 2**53


@dataclass(frozen=True, eq=False)
class Population:
    """Devices in a fixed order.

    Raises: ValueError if there is none, if the parts are of different lengths, or if a device has no example or cannot
    hold a single row.
    """

    names: Sequence[str]
    classes: Sequence[str]
    """Of devices that are alike, so that one tells of another."""
    label_counts: Tensor
    """(devices, labels) int64; where there are no labels, one column with the number of examples."""
    memory_rows: Tensor | None = None
    """Most rows that each device's memory holds, (devices,) int64; None where memory is no matter."""

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.classes), len(self.label_counts), len(self.limits)}
        if len(lengths) > 1 or not self.names:
            raise ValueError("Names, classes, label counts and memory must be of the same devices, at least one.")
        if bool((self.label_counts < 0).any()) or int(self.limits.min()) < 1:
            raise ValueError("Every device needs at least one example, and memory for at least one row.")

    @property
    def memory_limits(self) -> list[int]:
        """Most rows of each device that its memory holds."""
        return [_ANY_ROWS] * len(self.names) if self.memory_rows is None else self.memory_rows.tolist()

    @cached_property
    def limits(self) -> Tensor:
        """Most rows of each device's batch, (devices,) int64: no example twice, and no more than memory holds."""
        examples = self.label_counts.sum(dim=1)
        return examples if self.memory_rows is None else examples.minimum(self.memory_rows)

    @cached_property
    def distributions(self) -> Tensor:
        """V, (devices, labels) float64."""
        return label_distributions(self.label_counts)

    @cached_property
    def reference(self) -> Tensor:
        """Phi_0, (labels,) float64."""
        return reference_distribution(self.distributions)
