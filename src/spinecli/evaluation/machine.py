"""The machine that an evaluation runs on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import JsonValue


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Torch's thread count inside, the previous one outside."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def machine_facts(device: str, threads: int) -> dict[str, JsonValue]:
    """Where the figures come from, without naming the host."""
    accelerator = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "accelerator": accelerator,
        "torch": torch.__version__,
    }
