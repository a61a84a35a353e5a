"""Whether the devices' memory holds what a strategy asks of them, counted from shapes before anything is loaded.

The count is that of the uncut model with whole batches of the longest rows. What pruning frees in the rounds is not
counted on: a device starts with the dense weights, and goes back to what it had when its answer is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spinecli.checkpoints.shape import BlockShape
from spinecli.lora.cost import TrainingCosts


@dataclass(frozen=True)
class TrainingMemory:
    """What LoRA training of one model takes on a device, by the ranks of its blocks."""

    costs: TrainingCosts
    shapes: Sequence[BlockShape]
    rows: int
    """Of a batch."""
    length: int
    """Tokens of a row."""
    bytes_per_weight: int

    def needed(self, ranks: Sequence[int]) -> int:
        """Bytes while training at these ranks, one a block."""
        return self.costs.memory(self.shapes, ranks, self.rows, self.length, self.bytes_per_weight).total

    def fitting(self, menu: Sequence[Sequence[int]], limit: int) -> list[Sequence[int]]:
        """The choices of a menu that a limit in bytes holds, in the menu's order."""
        return [ranks for ranks in menu if self.needed(ranks) <= limit]


@dataclass(frozen=True)
class DeviceGroup:
    """Devices that are alike."""

    device_class: str
    memory_bytes: int
    devices: int
    examples: int
    """Of the device that has most."""


@dataclass(frozen=True)
class MemoryNeed:
    """What a strategy asks of the memory of devices that are alike."""

    device_class: str
    devices: int
    limit_bytes: int
    least_bytes: int
    """For the least that the strategy can ask of them."""
    most_bytes: int
    """For the most that it will ask of them; the least where not even that fits."""
    work: str
    """What that is, in words."""

    @property
    def fits(self) -> bool:
        """Whether they can take part."""
        return self.least_bytes <= self.limit_bytes


def places_of(devices: Iterable[tuple[str, int, int]]) -> list[DeviceGroup]:
    """Devices, given as (class, memory in bytes, examples), put together where class and memory are the same."""
    known = list(devices)
    counts = Counter((device_class, memory) for device_class, memory, _ in known)
    most = {key: max(count for *other, count in known if tuple(other) == key) for key in counts}
    return [DeviceGroup(*key, devices, most[key]) for key, devices in counts.items()]


def needs_of(
    places: Sequence[DeviceGroup], least: Callable[[DeviceGroup], int], most: Callable[[DeviceGroup], tuple[int, str]]
) -> list[MemoryNeed]:
    """The table of needs against limits.

    Args:
        least: bytes for the least that can be asked of such a device.
        most: bytes for the most that will be asked, and what that is; both of the least where that does not fit.
    """
    return [
        MemoryNeed(place.device_class, place.devices, place.memory_bytes, least(place), *most(place))
        for place in places
    ]


def objection(needs: Sequence[MemoryNeed], strategy: str, remedy: str, *, leaves_out: bool) -> str | None:
    """Why a run cannot begin, in a sentence; None if it can.

    Args:
        remedy: what makes the need smaller, as an imperative.
        leaves_out: devices that cannot do the least sit out, so that one that can is enough.
    """
    misfits = [need for need in needs if not need.fits]
    if not misfits or (leaves_out and len(misfits) < len(needs)):
        return None
    if leaves_out:
        roomiest = max(misfits, key=lambda need: need.limit_bytes)
        return f"No device of the fleet can hold {strategy}: {_compared(roomiest)}; {remedy}."
    return f"The fleet cannot hold {strategy}: {_compared(misfits[0])}; {remedy}."


def sitting_out(needs: Sequence[MemoryNeed], strategy: str) -> list[str]:
    """A note for each kind of device that the strategy leaves out."""
    return [f"{_compared(need)} under {strategy}, and so sit out" for need in needs if not need.fits]


def _compared(need: MemoryNeed) -> str:
    return (
        f"devices of class {need.device_class} have {_gigabytes(need.limit_bytes)} and need at least "
        f"{_gigabytes(need.least_bytes)} ({need.work})"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
