"""The server's first look at its devices: how fast each computes and communicates, before any of them trains.

MergeSFL assumes that the state of every device is known when a round is planned. After the first look only those that
take part are observed. How the look is taken is this project's own: two exchanges of different sizes tell a link's rate
from its latency, with a few rows of the device's own forward and backward in each; nothing that is computed leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spinecli.federation.engine import Engine, Job, Reply
from spinecli.federation.messages import Message
from spinecli.split.control.estimates import Iteration, Pace, Transfer, observed_pace
from spinecli.split.messages import PAYLOAD, PROBE, ProbeOrder

_ROWS = (1, 4)


@dataclass(frozen=True)
class Look:
    """What a first look has shown."""

    paces: dict[str, Pace | None]
    """By device; those that did not answer twice are left out."""
    bytes: int
    """That it took, both ways."""


def look_at(engine: Engine, limits: Mapping[str, int], row_bytes: float, deadline: float | None) -> Look:
    """Probe all devices at once, with messages as large as features of as many rows would be.

    Args:
        limits: most rows that each device's memory holds; by device.
        row_bytes: of one row's features.
        deadline: seconds after which an exchange does not wait any longer.
    """
    iterations: dict[str, list[Iteration]] = {device: [] for device in limits}
    sent = 0
    for part, wanted in enumerate(_ROWS):
        rows_of = {device: min(wanted, limit) for device, limit in limits.items()}
        messages = {rows: _message(rows, row_bytes) for rows in set(rows_of.values())}
        jobs = [Job(device, PROBE, 0, messages[rows], part, len(_ROWS)) for device, rows in rows_of.items()]
        for outcome in engine.exchange(jobs, deadline):
            if isinstance(outcome, Reply):
                timing = outcome.timing
                sent += timing.bytes_down + timing.bytes_up
                upload = Transfer(timing.bytes_up, timing.upload_seconds)
                download = Transfer(timing.bytes_down, timing.download_seconds)
                iterations[outcome.device].append(
                    Iteration(rows_of[outcome.device], timing.compute_seconds, upload, download)
                )
            else:
                sent += outcome.bytes_down
    seen = {device: each for device, each in iterations.items() if len(each) == len(_ROWS)}
    return Look({device: observed_pace(each) for device, each in seen.items()}, sent)


def _message(rows: int, row_bytes: float) -> Message:
    payload = {PAYLOAD: torch.zeros(math.ceil(rows * row_bytes), dtype=torch.uint8)}
    return Message(ProbeOrder(rows=rows).model_dump(mode="json"), payload)
