"""Where to cut: what fits every class of devices, and loads them with as much as their links let pass unnoticed.

Features are (tokens, d_model) wherever a transformer is cut, so a deeper cut sends no more; it costs the devices
computing time, spares the server, and keeps what leaves a device further from its texts. The cut is the deepest one
whose computing takes a device of the slowest class no longer than its transfer does. This rule is this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.errors import OptionError
from spinecli.federation.conditions import conditions
from spinecli.federation.fleet import DeviceSpec, Fleet
from spinecli.split.cost import SplitCosts


@dataclass(frozen=True)
class Iteration:
    """What an iteration of a cut asks of a device."""

    memory_bytes: int
    flops: int


def iteration_of(costs: SplitCosts, rows: int, length: int) -> Iteration:
    """One batch through the bottom and back."""
    return Iteration(costs.bottom_memory(rows, length), costs.bottom(rows, length).flops)


def choose_cut(cuts: dict[int, Iteration], message_bytes: int, fleet: Fleet, seed: int) -> int:
    """The cut, given what each possible one asks for.

    Args:
        message_bytes: features of one batch; the gradients that come back are as many.
        seed: of the fleet's conditions; those of the first round count, with jitter at its median.

    Raises: OptionError naming the class that cannot hold even the shallowest bottom.
    """
    smallest = min(fleet.classes, key=lambda found: found.memory_bytes)
    fitting = [cut for cut, asked in cuts.items() if asked.memory_bytes <= smallest.memory_bytes]
    if not fitting:
        shallowest = min(cuts)
        raise OptionError(
            f"Devices of class {smallest.name} have {smallest.memory_gb:g} GB, and the bottom cut before block "
            f"{shallowest} needs {cuts[shallowest].memory_bytes / 1e9:.2g} GB; lower --batch-size or --max-length."
        )

    def unnoticed(cut: int) -> bool:
        return all(
            _compute_seconds(device, cuts[cut].flops, seed) <= _transfer_seconds(device, message_bytes, seed)
            for device in fleet.devices
        )

    return max((cut for cut in fitting if unnoticed(cut)), default=min(fitting))


def _compute_seconds(device: DeviceSpec, flops: int, seed: int) -> float:
    now = conditions(device, seed, 0)
    return now.compute_seconds(flops) / now.jitter


def _transfer_seconds(device: DeviceSpec, size: int, seed: int) -> float:
    now = conditions(device, seed, 0)
    return now.upload_seconds(size) + now.download_seconds(size)
