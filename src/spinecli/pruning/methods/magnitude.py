"""Magnitude: a unit weighs as much as the squared weights that would leave with it."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.pruning.method import BlockView, UnitScores


@dataclass(frozen=True)
class Magnitude:
    """No calibration data, no blocks."""

    name: str = "magnitude"
    needs_gram: bool = False
    cuts_blocks: bool = False
    cuts_units: bool = True

    def score(self, view: BlockView) -> UnitScores:
        """Squared L2 norm of all weights of each KV group and each channel."""
        attention, feed_forward = view.family.attention, view.family.feed_forward
        groups = view.attention_output.double().square().sum(dim=0).view(view.shape.kv_heads, -1).sum(dim=1)
        for name in (attention.query, attention.key, attention.value):
            groups = groups + view.weight(name).double().square().sum(dim=1).view(view.shape.kv_heads, -1).sum(dim=1)
        channels = view.feed_forward_output.double().square().sum(dim=0)
        for name in feed_forward.inputs:
            channels = channels + view.weight(name).double().square().sum(dim=1)
        return UnitScores(groups.cpu(), channels.cpu())
