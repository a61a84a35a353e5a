"""What a scoring pass found out, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from spinecli.pruning.method import UnitScores


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of everything that can leave a checkpoint; higher = keep."""

    influence: Tensor
    """(blocks,) float64."""
    units: tuple[UnitScores, ...]
    """Of every block."""

    def tensors(self) -> dict[str, Tensor]:
        """By name, for safetensors."""
        found = {"influence": self.influence}
        for index, units in enumerate(self.units):
            found |= named(index, units)
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Scores:
        """The inverse of `tensors`."""
        influence = tensors["influence"]
        names = [field.name for field in fields(UnitScores)]
        units = (
            UnitScores(**{name: tensors[key] for name in names if (key := f"block.{index}.{name}") in tensors})
            for index in range(len(influence))
        )
        return cls(influence, tuple(units))


def named(index: int, units: UnitScores) -> dict[str, Tensor]:
    """A block's scores by name; what is unknown is left out."""
    found = {field.name: getattr(units, field.name) for field in fields(units)}
    return {f"block.{index}.{name}": value for name, value in found.items() if value is not None}
