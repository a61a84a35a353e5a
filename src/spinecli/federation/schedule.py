"""Learning rate over the rounds."""

from __future__ import annotations

import math

from spinecli.federation.config import Schedule


def learning_rate(base: float, schedule: Schedule, round_number: int, rounds: int) -> float:
    """The rate in a round counted from 0: constant, or falling from `base` to a tenth of it after the last round."""
    done = round_number / rounds
    share = {"constant": 1.0, "linear": 1 - 0.9 * done, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * done))}
    return base * share[schedule]
