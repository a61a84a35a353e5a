"""What the model is expected to lose as units leave one sub-layer.

    D(n) = D_half (E(n) / E(half))^p,   p so that D(all) = D_whole

E(n), the output error after n units have left and the others have compensated, gives the curve its shape; two measured
points give it its size and its bend. Inferred, see docs/algorithms/spine.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log

from torch import Tensor

_BENDS = (0.5, 3.0)
_SMALLEST = 1e-9


@dataclass(frozen=True)
class Sensitivity:
    """What the model loses by cutting one sub-layer alone."""

    half: float
    """With half of its units gone."""
    whole: float
    """With all of them gone."""


@dataclass(frozen=True, eq=False)
class DamageCurve:
    """Of one sub-layer."""

    block: int
    sub_layer: str
    """"attention" or "mlp"."""
    damage: Tensor
    """(units + 1,) float64, rising from 0: after the least important n units have left."""
    unit: int
    """Parameters that leave with a unit."""

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.damage) - 1

    @property
    def level(self) -> float:
        """The damage with half of the units gone."""
        return float(self.damage[(self.units + 1) // 2])


def damage_curve(block: int, sub_layer: str, errors: Tensor, unit: int, measured: Sensitivity) -> DamageCurve:
    """The curve through the two measured points.

    Args:
        errors: (units + 1,) float64, E.
    """
    units = len(errors) - 1
    half = units - (units + 1) // 2
    errors = errors.clamp_min(_SMALLEST * float(errors[-1]) + 1e-300)
    at_half, whole = max(measured.half, _SMALLEST), max(measured.whole, _SMALLEST)
    bend = 1.0
    if half and errors[-1] > errors[half]:
        bend = log(max(whole, at_half) / at_half) / log(float(errors[-1] / errors[half]))
        bend = min(max(bend, _BENDS[0]), _BENDS[1])
    anchor, value = (half, at_half) if half else (units, whole)
    damage = value * (errors / errors[anchor]) ** bend
    damage[0] = 0.0
    return DamageCurve(block, sub_layer, damage.cummax(dim=0).values, unit)


def tempered(curves: Sequence[DamageCurve], strength: float) -> list[DamageCurve]:
    """The curves with the differences between blocks reduced: level^strength, around the geometric mean.

    Args:
        strength: 1 leaves them as they are, 0 makes all blocks alike.
    """
    found = []
    for sub_layer in dict.fromkeys(curve.sub_layer for curve in curves):
        alike = [curve for curve in curves if curve.sub_layer == sub_layer]
        levels = [max(curve.level, _SMALLEST) for curve in alike]
        mean = exp(sum(log(level) for level in levels) / len(levels))
        found += [
            replace(curve, damage=curve.damage * (mean / level) ** (1 - strength))
            for curve, level in zip(alike, levels, strict=True)
        ]
    return found


def lower_hull(values: Tensor, steps: Sequence[int]) -> list[int]:
    """Those of the rising `steps`, indices into `values`, that lie on the lower convex hull."""
    hull: list[int] = []
    for step in steps:
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            slope = (values[last] - values[before]) / (last - before)
            if (values[step] - values[last]) / (step - last) > slope:
                break
            hull.pop()
        hull.append(step)
    return hull
