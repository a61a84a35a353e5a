"""What a user decides about cohorts and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spinecli.errors import OptionError
from spinecli.split.control.selection.registry import selection_of


@dataclass(frozen=True)
class ControlOptions:
    """Limits and choices that hold in every round.

    Raises: OptionError if one of them is out of range.
    """

    largest_batch: int = 64
    """D."""
    divergence_limit: float = 0.05
    """eps, in nats; infinite leaves the batches as their paces give them."""
    budget_rows: float = math.inf
    """Most rows of features that the server takes in an iteration: its ingress budget over the bytes of a row."""
    largest_cohort: int = 10
    """Most devices in a round."""
    equal_batch: int = 16
    """Everybody's batch before any pace is known, and in all rounds without regulation."""
    selection: str = "greedy"
    """The name of a selection."""
    regulation: bool = True
    """Whether batches follow paces and labels; without it all are equal, as in plain split federated learning."""

    def __post_init__(self) -> None:
        selection_of(self.selection)
        if not self.budget_rows >= 1:
            raise OptionError(
                f"--ingress holds {self.budget_rows:.2g} rows of features an iteration; raise it to at least one, or "
                "send smaller features with --feature-dtype."
            )
        rows = {"--largest-batch": self.largest_batch, "--batch-size": self.equal_batch}
        for name, value in {**rows, "--cohort": self.largest_cohort}.items():
            if value < 1:
                raise OptionError(f"{name} must be at least 1, not {value}.")
        if not self.divergence_limit >= 0:
            raise OptionError(f"--divergence-limit must be at least 0 nats, not {self.divergence_limit:g}.")
