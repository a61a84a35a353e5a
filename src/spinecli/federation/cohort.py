"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.federation.engine import Node
from spinecli.federation.seeding import random_generator


def draw_cohort(nodes: Sequence[Node], size: int, seed: int, round_number: int) -> list[str]:
    """`size` devices drawn without replacement, in the fleet's order; all of them if there are no more."""
    names = [node.name for node in nodes]
    if size >= len(names):
        return names
    drawn = set(random_generator(seed, "cohort", round_number).sample(names, size))
    return [name for name in names if name in drawn]
