"""Where to cut: what fits every class of devices, and as deep as costs next to no time.

Features are (tokens, d_model) wherever a transformer is cut, so a deeper cut sends no fewer of them, and takes longer:
the devices compute more, and their bottoms are larger. What it buys is that features are further from the texts they
come from, and work taken off the server. So the cut is the deepest one whose iterations take the slowest device at most
a tenth longer than those of the shallowest. This rule is this project's own, see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from spinecli.errors import OptionError
from spinecli.federation.conditions import Conditions, conditions
from spinecli.federation.fleet import Fleet

_SLACK = 1.1


@dataclass(frozen=True)
class Demand:
    """What an iteration of a cut asks of a device."""

    memory_bytes: int
    """With a whole batch."""
    flops: int
    """Of one row."""
    feature_bytes: int
    """Of one row; the gradients that come back are as many."""
    bottom_bytes: float
    """Of the bottom, which travels once a round, shared out over the round's iterations."""

    def seconds(self, now: Conditions) -> float:
        """Of an iteration with one row under these conditions."""
        size = self.feature_bytes + self.bottom_bytes
        transfer = now.upload_seconds(0) + now.download_seconds(0)
        transfer += 8 * size / now.up_bits_per_second + 8 * size / now.down_bits_per_second
        return now.compute_seconds(self.flops) + transfer


def choose_cut(demands: Mapping[int, Demand], fleet: Fleet, seed: int) -> int:
    """The cut, given what each possible one asks for.

    Args:
        demands: by the number of blocks in the bottom.
        seed: of the fleet's conditions; those of the first round count, with jitter at its median.

    Raises: OptionError naming the class that cannot hold even the shallowest bottom.
    """
    smallest = min(fleet.classes, key=lambda found: found.memory_bytes)
    fitting = [cut for cut, demand in sorted(demands.items()) if demand.memory_bytes <= smallest.memory_bytes]
    if not fitting:
        shallowest = min(demands)
        raise OptionError(
            f"Devices of class {smallest.name} have {smallest.memory_gb:g} GB, and the bottom cut before block "
            f"{shallowest} needs {demands[shallowest].memory_bytes / 1e9:.2g} GB; lower --batch-size or --max-length."
        )
    present = [replace(conditions(device, seed, 0), jitter=1.0) for device in fleet.devices]
    slowest = {cut: max(demands[cut].seconds(now) for now in present) for cut in fitting}
    return max(cut for cut in fitting if slowest[cut] <= _SLACK * slowest[fitting[0]])
