"""spine: units by what their loss costs after the others have compensated, and a re-fit of what stays.

What measurably lowered held-out perplexity: second-order scores, an allocation found by comparison, and closed-form
least squares against the dense model's outputs, block by block. The recipe is this project's own; its parts are in
docs/algorithms/spine.md, what each is worth in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.pruning.method import BlockView, UnitScores, score_by_elimination


@dataclass(frozen=True)
class Spine:
    """Blocks, KV groups and channels; blocks may end with different widths."""

    name: str = "spine"
    needs_gram: bool = True
    cuts_blocks: bool = True
    cuts_units: bool = True
    refits: bool = True

    def score(self, view: BlockView) -> UnitScores:
        """Importance of every KV group and channel, and what their loss costs."""
        return score_by_elimination(view)
