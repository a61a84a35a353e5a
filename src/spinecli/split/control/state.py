"""What the control module remembers from round to round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from torch import Tensor

from spinecli.split.control.estimates import RETENTION, Pace
from spinecli.split.control.population import Population


class ControlState(BaseModel):
    """Paces and participations by device name; written as JSON and read again, it plans the same to the last bit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    paces: dict[str, Pace] = {}
    """Of all devices that were ever observed."""
    participations: dict[str, int] = {}
    """K, completed rounds; 0 for who is not listed."""

    def after_round(
        self, observed: Mapping[str, Pace | None], completed: Iterable[str], retention: float = RETENTION
    ) -> ControlState:
        """The state after one more round; this one stays as it is.

        Args:
            observed: what the round told of its devices; also of those that were lost in it. None tells nothing.
            completed: the devices that took part to the end, whose K rises.
            retention: weight of the old estimate; the first observation of a device is taken as it is.
        """
        paces, participations = dict(self.paces), dict(self.participations)
        for name, pace in observed.items():
            if pace is not None:
                paces[name] = paces[name].updated(pace, retention) if name in paces else pace
        for name in completed:
            participations[name] = participations.get(name, 0) + 1
        return ControlState(paces=paces, participations=participations)

    def counts(self, population: Population) -> Tensor:
        """K, (devices,) int64."""
        return torch.tensor([self.participations.get(name, 0) for name in population.names])

    def values(self) -> dict[str, JsonValue]:
        """As plain JSON values, for `ControlState.model_validate` to read."""
        return self.model_dump(mode="json")
