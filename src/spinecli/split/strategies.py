"""The ways to train over a split model, as data. A new one is a line here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from spinecli.split.control.options import ControlOptions


@dataclass(frozen=True)
class SplitStrategy:
    """What of MergeSFL a strategy does."""

    merged: bool
    """The server trains on all features as one batch, and not on each device's apart."""
    selected: bool
    """Devices and batches are chosen so that the merged labels are like those of the fleet, and not at random."""
    regulated: bool
    """Batches follow the devices' paces, and are not all equal."""
    split: bool = True
    """The server has a half at all, and not only averages."""

    def control(self, options: ControlOptions) -> ControlOptions:
        """The control module's options with what this strategy leaves out taken out."""
        if self.selected:
            return replace(options, regulation=self.regulated)
        return replace(options, selection="random", divergence_limit=math.inf, regulation=self.regulated)


SPLIT_STRATEGIES = {
    "mergesfl": SplitStrategy(merged=True, selected=True, regulated=True),
    "sfl-fm": SplitStrategy(merged=True, selected=False, regulated=False),
    "sfl-br": SplitStrategy(merged=False, selected=False, regulated=True),
    "splitfed": SplitStrategy(merged=False, selected=False, regulated=False),
    "fedavg": SplitStrategy(merged=False, selected=False, regulated=False, split=False),
}
"""By the name that --strategy takes."""
