"""rounds.png: accuracy against time and traffic, idle share and divergence. Needs matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from spinecli.federation.history import RoundRecord

PICTURE_NAME = "rounds.png"


def save_picture(rounds: Sequence[RoundRecord], title: str, path: Path) -> None:
    """Draw the held-out accuracy over the engine's seconds and over megabytes, and the idle share over the rounds.

    Of split training also the divergence of the merged labels over the rounds.
    """
    from matplotlib.figure import Figure

    traffic = list(accumulate(record.bytes / 1e6 for record in rounds))
    measured = [(record, sent) for record, sent in zip(rounds, traffic, strict=True) if record.evaluation is not None]
    accuracy = [record.evaluation.accuracy for record, _ in measured if record.evaluation is not None]
    numbers = [record.round for record in rounds]
    panels = [
        ("seconds", [record.ended for record, _ in measured], accuracy, "held-out accuracy"),
        ("MB, up and down", [sent for _, sent in measured], accuracy, "held-out accuracy"),
        ("round", numbers, [record.idle_share for record in rounds], "idle share"),
    ]
    divergences = [record.split.divergence for record in rounds if record.split is not None]
    if len(divergences) == len(rounds):
        panels.append(("round", numbers, divergences, "KL of merged labels, nats"))
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axis, (across, x, y, up) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axis.plot(x, y, marker="o", markersize=3, color="#4472c4")
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144, metadata={"Software": None})
