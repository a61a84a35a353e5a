"""Ranks by what a device says of itself when it enrols: more memory, more rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from spinecli.federation.engine import Node


def ranks_by_memory(nodes: Sequence[Node], smallest: int, largest: int) -> dict[str, int]:
    """A rank for every device, see `rank_by_memory`."""
    sizes = {node.memory_bytes for node in nodes}
    ranks = {size: rank_by_memory(size, sizes, smallest, largest) for size in sizes}
    return {node.name: ranks[node.memory_bytes] for node in nodes}


def rank_by_memory(size: int, sizes: Collection[int], smallest: int, largest: int) -> int:
    """A rank: from `smallest` for the least memory in the fleet to `largest` for the most.

    Classes in between are spread evenly, whatever the distances between their memories; a fleet of one class gets the
    middle. Source: HETLoRA leaves the choice of ranks open; this is this project's.

    Args:
        size: bytes of the device.
        sizes: those of all devices.
    """
    rising = sorted(set(sizes))
    if len(rising) == 1:
        return round((smallest + largest) / 2)
    step = (largest - smallest) / (len(rising) - 1)
    return round(smallest + rising.index(size) * step)
