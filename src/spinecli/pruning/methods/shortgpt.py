"""ShortGPT: only whole blocks leave, those with the least influence on the hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.pruning.method import BlockView, UnitScores, unscored


@dataclass(frozen=True)
class ShortGpt:
    """No units."""

    name: str = "shortgpt"
    needs_gram: bool = False
    cuts_blocks: bool = True
    cuts_units: bool = False
    refits: bool = False

    def score(self, view: BlockView) -> UnitScores:
        """Units are not ranked."""
        return unscored(view.shape)
