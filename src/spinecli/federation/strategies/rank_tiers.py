"""Ranks by what a device says of itself when it enrols: more memory, more rank."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.federation.engine import Node


def ranks_by_memory(nodes: Sequence[Node], smallest: int, largest: int) -> dict[str, int]:
    """A rank for every device: from `smallest` for the least memory in the fleet to `largest` for the most.

    Classes in between are spread evenly, whatever the distances between their memories; a fleet of one class gets the
    middle. Source: HETLoRA leaves the choice of ranks open; this is this project's.
    """
    sizes = sorted({node.memory_bytes for node in nodes})
    if len(sizes) == 1:
        return {node.name: round((smallest + largest) / 2) for node in nodes}
    step = (largest - smallest) / (len(sizes) - 1)
    return {node.name: round(smallest + sizes.index(node.memory_bytes) * step) for node in nodes}
