"""The directory that holds what a device process needs of its own."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from spinecli.errors import OptionError
from spinecli.federation.client.part import part_of, save_part
from spinecli.federation.request import FederatedRequest
from spinecli.remote.client_config import ClientConfig

MOST_DEVICES = 32


def require_few(request: FederatedRequest) -> None:
    """Raise OptionError if the fleet has more devices than one machine should run as processes."""
    count = len(request.fleet.devices)
    if count > MOST_DEVICES:
        raise OptionError(
            f"--engine {request.config.engine.name} would start {count} devices on this machine; name up to "
            f"{MOST_DEVICES} with --devices, for example --devices 3."
        )


def prepare_client_dir(request: FederatedRequest, number: int, place: Path) -> ClientConfig:
    """Write into a directory what the fleet's device of this number needs, and nothing of the others."""
    place.mkdir(exist_ok=True)
    save_part(part_of(request.train, request.parts[number]), place / "part.safetensors")
    spec = request.fleet.devices[number]
    return ClientConfig(
        device=spec.name,
        model=str(request.checkpoint.path.resolve()),
        part=place.resolve() / "part.safetensors",
        memory=place.resolve(),
        device_class=spec.device_class.name,
        memory_bytes=spec.device_class.memory_bytes,
        threads=_threads(request),
        compute_device=request.compute.device,
    )


def _threads(request: FederatedRequest) -> int:
    """Of a device's training: a fair share of the machine, or what this process has where results must be its own."""
    if request.config.clock == "fleet":
        return torch.get_num_threads()
    return max(1, (os.cpu_count() or 1) // len(request.fleet.devices))
