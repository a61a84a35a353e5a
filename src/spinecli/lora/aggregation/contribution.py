"""What one device hands to an aggregation, and the way between a pruned device's factors and the full shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from spinecli.lora.factors import Adapter, Factors


@dataclass(frozen=True, eq=False)
class Contribution:
    """One device's factors, scale folded into B, in the shape that the device has after pruning.

    A projection that the device does not train is absent from the adapter, and the device does not count in its mean.
    A device that has lost heads or channels names what it kept of each projection: rows where its outputs left, columns
    where its inputs left, never both.
    """

    adapter: Adapter
    weight: float
    """Share in the mean before it is normalised; the number of training examples unless a rule says otherwise."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """Kept output units by projection, rising indices into the full d_out; absent: all."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Kept input units by projection, rising indices into the full d_in; absent: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"A contribution's weight is {self.weight}; it must be finite and not negative.")
        for name, factors in self.adapter.items():
            rows, columns = self.rows.get(name), self.columns.get(name)
            if rows is not None and columns is not None:
                raise ValueError(f"{name} has lost rows and columns; a projection loses outputs or inputs, not both.")
            if rows is not None and len(rows) != factors.b.shape[0]:
                raise ValueError(f"{name} names {len(rows)} kept rows, and B has {factors.b.shape[0]}.")
            if columns is not None and len(columns) != factors.a.shape[1]:
                raise ValueError(f"{name} names {len(columns)} kept columns, and A has {factors.a.shape[1]}.")

    def embedded(self, name: str, shape: tuple[int, int]) -> Factors:
        """A projection's factors at the full shape (d_out, d_in), zero where the device has lost units."""
        return embedded(self.adapter[name], shape, self.rows.get(name), self.columns.get(name))


def embedded(
    factors: Factors, shape: tuple[int, int], rows: Tensor | None = None, columns: Tensor | None = None
) -> Factors:
    """Factors at the full shape (d_out, d_in): zero rows of B and zero columns of A where units are gone."""
    a, b = factors.a, factors.b
    if rows is not None:
        b = b.new_zeros(shape[0], factors.rank).index_copy(0, rows.to(b.device), b)
    if columns is not None:
        a = a.new_zeros(factors.rank, shape[1]).index_copy(1, columns.to(a.device), a)
    if (b.shape[0], a.shape[1]) != shape:
        raise ValueError(f"Factors of {b.shape[0]} x {a.shape[1]} do not fit a projection of {shape[0]} x {shape[1]}.")
    return Factors(a, b)


def restricted(factors: Factors, rows: Tensor | None = None, columns: Tensor | None = None) -> Factors:
    """Full factors cut to the units that a device has kept; the way back of `embedded`."""
    a = factors.a if columns is None else factors.a.index_select(1, columns.to(factors.a.device))
    b = factors.b if rows is None else factors.b.index_select(0, rows.to(factors.b.device))
    return Factors(a, b)


def resized(factors: Factors, rank: int) -> Factors:
    """Factors of exactly `rank`: cut, or padded with zero rows of A and zero columns of B (HETLoRA's padding)."""
    if factors.rank >= rank:
        return factors.truncated(rank)
    a = factors.a.new_zeros(rank, factors.a.shape[1])
    b = factors.b.new_zeros(factors.b.shape[0], rank)
    a[: factors.rank] = factors.a
    b[:, : factors.rank] = factors.b
    return Factors(a, b)


def projection_names(contributions: Iterable[Contribution], previous: Adapter) -> list[str]:
    """Every projection of the global adapter, then those that only devices have, in order of appearance."""
    held = (name for contribution in contributions for name in contribution.adapter)
    return list(dict.fromkeys([*previous, *held]))


def full_shape(name: str, contributions: Sequence[Contribution], previous: Adapter) -> tuple[int, int]:
    """(d_out, d_in) of a projection before any pruning.

    Raises: ValueError if the global adapter lacks the projection and every holder has lost units of it.
    """
    if name in previous:
        return previous[name].b.shape[0], previous[name].a.shape[1]
    for contribution in contributions:
        if name in contribution.adapter and name not in contribution.rows and name not in contribution.columns:
            factors = contribution.adapter[name]
            return factors.b.shape[0], factors.a.shape[1]
    raise ValueError(f"The full shape of {name} is unknown: no device holds it whole, nor does the global adapter.")
