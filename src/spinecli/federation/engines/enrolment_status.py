"""How far devices elsewhere are before a run begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EnrolmentStatus:
    """How far the devices are before the first job."""

    ready: tuple[str, ...]
    troubles: Mapping[str, str]
    """Why devices that have come are not ready, by name."""
