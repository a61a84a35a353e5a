"""A whole fleet on this machine: server and devices as processes that talk over the loopback interface.

The server is this process. Each device gets its own share of the data in a file, a certificate, and a directory for
what it remembers; all of it lies in the run's state directory, so that a resumed run finds it and a finished one leaves
none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from spinecli.errors import FederationError, OptionError
from spinecli.federation.data.part import part_of, save_part
from spinecli.federation.engine import Engine
from spinecli.federation.engines.nvflare.certificates import certify, read_identity
from spinecli.federation.engines.nvflare.engine import NvflareEngine, Standing
from spinecli.federation.engines.nvflare.line import Address, free_port, log_to
from spinecli.federation.engines.nvflare.names import SERVER
from spinecli.federation.engines.virtual_clock import VirtualClock
from spinecli.federation.request import FederatedRequest
from spinecli.remote.charter import charter_of
from spinecli.remote.device import Launched
from spinecli.remote.home import Home
from spinecli.split.request import SplitRequest

LOOPBACK = "127.0.0.1"
MOST_DEVICES = 32
_STOP_SECONDS = 10.0
_LOG_NAME = "log.txt"
_LAST_LINES = 3


@dataclass(frozen=True, eq=False)
class _Running:
    """A device's process."""

    name: str
    process: subprocess.Popen[str]
    log: Path


def require_few(request: FederatedRequest) -> None:
    """Raise OptionError if the fleet has more devices than one machine should run as processes."""
    count = len(request.fleet.devices)
    if count > MOST_DEVICES:
        raise OptionError(
            f"--engine nvflare would start {count} devices on this machine; name up to {MOST_DEVICES} with --devices, "
            "for example --devices 3."
        )


@contextmanager
def on_this_machine(
    request: FederatedRequest,
    split: SplitRequest | None,
    state: Path,
    note: Callable[[str], None],
) -> Iterator[Engine]:
    """An engine with every device of the fleet as a process here; all of them end when the context does.

    Args:
        state: where what devices keep is found again by a resumed run.
        note: told in a line what runs where.

    Raises: FederationError if a device cannot take part.
    """
    place = state / "devices"
    place.mkdir(mode=0o700, exist_ok=True)
    names = [spec.name for spec in request.fleet.devices]
    certify(place / "identities", names, [LOOPBACK])
    log_to(place / f"{SERVER}-{_LOG_NAME}")
    address = Address(LOOPBACK, free_port())
    clock = VirtualClock(request.fleet, request.options.seed) if request.options.clock == "fleet" else None
    charter = charter_of(request, split).model_dump_json().encode()
    with ExitStack() as stack:
        running: list[_Running] = []
        engine = NvflareEngine(names, charter, address, read_identity(place / "identities" / SERVER), clock)
        stack.callback(_stop, running)
        stack.callback(engine.close)
        for number, name in enumerate(names):
            running.append(_start(request, number, name, place, address))
        note(f"server and {len(names)} devices listen and connect on {address} alone, with mutual TLS")
        engine.wait_for_all(lambda standing: _require_all(running, standing))
        yield engine


def _start(request: FederatedRequest, number: int, name: str, place: Path, address: Address) -> _Running:
    own = place / name
    own.mkdir(exist_ok=True)
    save_part(part_of(request.train, request.parts[number]), own / "part.safetensors")
    device_class = request.fleet.devices[number].device_class
    home = Home(
        device=name,
        model=str(request.checkpoint.path.resolve()),
        part=own.resolve() / "part.safetensors",
        memory=own.resolve(),
        device_class=device_class.name,
        memory_bytes=device_class.memory_bytes,
        threads=_threads(request),
        compute_device=request.options.compute.device,
    )
    launched = Launched(
        device=name,
        host=address.host,
        port=address.port,
        identity=(place / "identities" / name).resolve(),
        home=home.model_dump_json(),
    )
    log = own / _LOG_NAME
    with log.open("w", encoding="utf-8") as output:
        # a session of its own: Ctrl-C is for the launcher, which then ends its devices in order
        process = subprocess.Popen(
            [sys.executable, "-m", "spinecli.remote.device"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(launched.model_dump_json() + "\n")
    process.stdin.flush()
    return _Running(name, process, log)


def _threads(request: FederatedRequest) -> int:
    """Of a device's training: a fair share of the machine, or what this process has where results must be its own."""
    if request.options.clock == "fleet":
        return torch.get_num_threads()
    return max(1, (os.cpu_count() or 1) // len(request.fleet.devices))


def _require_all(running: Sequence[_Running], standing: Standing) -> None:
    """Raise FederationError if one of the devices cannot take part."""
    for name, explanation in standing.troubles.items():
        raise FederationError(f"The device {name} cannot take part: {explanation}")
    for device in running:
        if (code := device.process.poll()) is not None:
            lines = device.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = " ".join(line.strip() for line in lines[-_LAST_LINES:]).strip()
            raise FederationError(f"The device {device.name} has ended with exit code {code}: {last}")


def _stop(running: Sequence[_Running]) -> None:
    """End every process: asked by closing its input, and made to if it does not listen."""
    for device in running:
        assert device.process.stdin is not None
        device.process.stdin.close()
    deadline = time.monotonic() + _STOP_SECONDS
    for device in running:
        try:
            device.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            device.process.kill()
            device.process.wait()
