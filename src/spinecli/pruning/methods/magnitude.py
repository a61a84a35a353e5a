"""Magnitude: a unit weighs as much as the squared weights that would leave with it."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.checkpoints.cutting import attention_rows, channel_rows
from spinecli.pruning.method import BlockView, UnitScores


@dataclass(frozen=True)
class Magnitude:
    """No calibration data, no blocks."""

    name: str = "magnitude"
    needs_gram: bool = False
    cuts_blocks: bool = False
    cuts_units: bool = True
    refits: bool = False

    def score(self, view: BlockView) -> UnitScores:
        """Squared L2 norm of all weights of each KV group and each channel."""
        attention, feed_forward = view.family.attention, view.family.feed_forward
        groups = view.attention_output.double().square().sum(dim=0).view(view.shape.kv_heads, -1).sum(dim=1)
        names = (attention.query, attention.key, attention.value)
        for name, rows in zip(names, attention_rows(attention, view.shape), strict=True):
            squares = view.weight(name).double().square().sum(dim=1)
            groups = groups + squares[rows.to(squares.device)].view(view.shape.kv_heads, -1).sum(dim=1)
        channels = view.feed_forward_output.double().square().sum(dim=0)
        for name, rows in zip(feed_forward.inputs, channel_rows(feed_forward, view.shape), strict=True):
            squares = view.weight(name).double().square().sum(dim=1)
            channels = channels + squares[rows.to(squares.device)]
        return UnitScores(groups.cpu(), channels.cpu())
