"""A whole fleet on this machine: server and devices as processes that talk over the loopback interface.

The server is this process. Each device gets its own share of the data in a file, a certificate, and a directory for
what it remembers; all of it lies in the run's state directory, so that a resumed run finds it and a finished one leaves
none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spinecli.federation.engine import Engine
from spinecli.federation.engines.loopback import LOOPBACK, free_port
from spinecli.federation.engines.nvflare.certificates import certify, read_identity
from spinecli.federation.engines.nvflare.connection import Address, log_to
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.engines.nvflare.names import SERVER
from spinecli.federation.request import FederatedRequest
from spinecli.federation.simulation.virtual_clock import VirtualClock
from spinecli.remote.client_dir import prepare_client_dir
from spinecli.remote.device import LaunchedDevice
from spinecli.remote.run_config import run_config_of
from spinecli.remote.running import LOG_NAME, Running, require_all, start, stop


@contextmanager
def on_this_machine(
    request: FederatedRequest,
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
    log_to(place / f"{SERVER}-{LOG_NAME}")
    address = Address(LOOPBACK, free_port())
    clock = VirtualClock(request.fleet, request.config.seed) if request.config.clock == "fleet" else None
    run_config = run_config_of(request).model_dump_json().encode()
    with ExitStack() as stack:
        running: list[Running] = []
        engine = NvflareEngine(names, run_config, address, read_identity(place / "identities" / SERVER), clock)
        stack.callback(stop, running)
        stack.callback(engine.close)
        for number, name in enumerate(names):
            running.append(_start(request, number, name, place, address))
        note(f"server and {len(names)} devices listen and connect on {address} alone, with mutual TLS")
        engine.wait_for_all(lambda status: require_all(running, status))
        yield engine


def _start(request: FederatedRequest, number: int, name: str, place: Path, address: Address) -> Running:
    own = place / name
    launched = LaunchedDevice(
        device=name,
        host=address.host,
        port=address.port,
        identity=(place / "identities" / name).resolve(),
        client=prepare_client_dir(request, number, own).model_dump_json(),
    )
    return start(name, "spinecli.remote.device", launched, own)
