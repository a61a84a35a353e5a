"""plan.png: who takes how long and who waits, and which blocks are trained. Needs matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spinecli.federation.planning.artifact import PlanTensors
from spinecli.federation.planning.outcome import Outcome

PICTURE_NAME = "plan.png"

_COMPUTE, _TRANSFER, _UNIFORM = "#4472c4", "#ed7d31", "#7f7f7f"


def save_picture(outcome: Outcome, uniform: Outcome, tensors: PlanTensors, path: Path) -> None:
    """Draw the devices' seconds under both plans, and the rank and the holders of every block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_seconds(left, outcome, uniform, tensors)
    _draw_blocks(right, outcome)
    figure.savefig(path, dpi=144, metadata={"Software": None})


def _draw_seconds(axis: Any, outcome: Outcome, uniform: Outcome, tensors: PlanTensors) -> None:
    order = outcome.seconds.argsort(stable=True)
    order = order[outcome.depths[order] > 0]
    places = torch.arange(1, len(order) + 1).tolist()
    compute = tensors.compute_seconds[order].tolist()
    axis.fill_between(places, 0, compute, step="mid", color=_COMPUTE, label="compute", lw=0)
    whole = outcome.seconds[order].tolist()
    axis.fill_between(places, compute, whole, step="mid", color=_TRANSFER, label="transfer", lw=0)
    axis.axhline(outcome.round_seconds, color="black", lw=1, label="round")
    if uniform.round_seconds:
        others = uniform.seconds[uniform.depths > 0].sort().values
        axis.step(
            torch.arange(1, len(others) + 1).tolist(),
            others.tolist(),
            where="mid",
            color=_UNIFORM,
            lw=1,
            label="uniform plan",
        )
        axis.axhline(uniform.round_seconds, color=_UNIFORM, lw=1, ls="--", label="its round")
    axis.set_xlabel("devices, fastest first")
    axis.set_ylabel("seconds")
    axis.set_ylim(bottom=0)
    axis.set_title("a round; above the colours is waiting", fontsize=9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def _draw_blocks(axis: Any, outcome: Outcome) -> None:
    blocks = len(outcome.ranks)
    axis.bar(range(blocks), outcome.ranks.tolist(), color=_COMPUTE, width=0.8)
    axis.set_xlabel("block, input to output")
    axis.set_ylabel("rank (bars)")
    holders = (outcome.depths[:, None] >= blocks - torch.arange(blocks)).sum(dim=0)
    share = axis.twinx()
    share.plot(range(blocks), (100 * holders / len(outcome.depths)).tolist(), "o-", color=_TRANSFER, ms=4)
    share.set_ylabel("devices that train it, % (line)")
    share.set_ylim(0, 105)
    axis.set_title("where LoRA is", fontsize=9)
