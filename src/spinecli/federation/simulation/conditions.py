"""What holds for one device in one round: its speed, its links, and whether it fails.

Every value is drawn from a hash of the seed, the device's name, what is drawn, and the round. It depends on nothing
else: not on the order of calls, not on which other devices exist, not on which of them take part.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from statistics import NormalDist

from spinecli.federation.simulation.fleet import DeviceSpec

_STANDARD_NORMAL = NormalDist()


@dataclass(frozen=True)
class Conditions:
    """One device in one round. A strategy never sees it, only the times that follow from it."""

    flops_per_second: float
    up_bits_per_second: float
    down_bits_per_second: float
    latency_seconds: float
    """Per message, either way."""
    jitter: float
    """Factor on the compute time; its median is 1."""
    fails_at: float | None
    """Share in [0, 1) of the round's compute time after which the device fails; None if it does not fail."""

    def compute_seconds(self, flops: float) -> float:
        """Time to compute `flops` floating-point operations."""
        return flops / self.flops_per_second * self.jitter

    def upload_seconds(self, size: int) -> float:
        """Time of one message of `size` bytes to the server."""
        return self.latency_seconds + 8 * size / self.up_bits_per_second

    def download_seconds(self, size: int) -> float:
        """Time of one message of `size` bytes from the server."""
        return self.latency_seconds + 8 * size / self.down_bits_per_second


def conditions(device: DeviceSpec, seed: int, round_number: int) -> Conditions:
    """The conditions of `device` in one round, counted from 0.

    Mode and links change together every `mode_rounds` rounds. One draw, the quality of the link, places both uplink and
    downlink in their intervals: a device far from its access point has both slow. Jitter and failures are drawn anew in
    every round.
    """
    if round_number < 0:
        raise ValueError(f"rounds count from 0, not {round_number}")
    device_class = device.device_class
    period = round_number // device_class.mode_rounds if device_class.mode_rounds else 0
    mode = int(_uniform(seed, device, "mode", period) * len(device_class.modes))
    link = _uniform(seed, device, "link", period)
    deviation = _STANDARD_NORMAL.inv_cdf(_uniform(seed, device, "jitter", round_number))
    fails = _uniform(seed, device, "failure", round_number) < device_class.dropout
    return Conditions(
        flops_per_second=device_class.modes[mode],
        up_bits_per_second=1e6 * _within(device_class.up_mbps, link),
        down_bits_per_second=1e6 * _within(device_class.down_mbps, link),
        latency_seconds=device_class.latency_ms / 1e3,
        jitter=math.exp(device_class.jitter * deviation),
        fails_at=_uniform(seed, device, "failure time", round_number) if fails else None,
    )


def _within(band: tuple[float, float], share: float) -> float:
    low, high = band
    return low + share * (high - low)


def _uniform(seed: int, device: DeviceSpec, purpose: str, number: int) -> float:
    """A number in (0, 1), uniform over what is hashed and the same on every machine."""
    key = json.dumps([seed, device.name, purpose, number]).encode()
    bits = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 12
    return (bits + 0.5) / 2**52
