"""A server for devices on machines of their own: it listens, waits until all have come, and carries the run's jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spinecli.federation.config import EngineConfig, FederateConfig
from spinecli.federation.engine import Engine
from spinecli.federation.engines.enrolment_status import EnrolmentStatus
from spinecli.federation.engines.nvflare.certificates import read_identity
from spinecli.federation.engines.nvflare.connection import Address, log_to
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.request import FederatedRequest, open_request
from spinecli.federation.simulation.fleet import Fleet
from spinecli.remote.run_config import run_config_of

_LOG_NAME = "server-log.txt"


def open_server_request(config: FederateConfig, names: Sequence[str]) -> FederatedRequest:
    """A request without training data, which stays on the devices: what is held out decides task and labels.

    Raises: what `open_request` can raise.
    """
    served = config.model_copy(
        update={
            "fleet": f"uniform-{len(names)}",
            "plan": None,
            "data": config.data.model_copy(update={"evaluation": config.data.train, "partition": "iid"}),
            "engine": EngineConfig(name="nvflare"),
        }
    )
    request = open_request(served, deal=False)
    joined = ", ".join(names)
    return replace(request, fleet=Fleet(joined, (), joined))


@contextmanager
def serving(
    request: FederatedRequest,
    names: Sequence[str],
    address: Address,
    identity: Path | None,
    state: Path,
    note: Callable[[str], None],
) -> Iterator[Engine]:
    """An engine that listens at an address for as long as the context lasts, once every named device is ready.

    Raises: FederationError if nothing can listen there.
    """
    log_to(state / _LOG_NAME)
    own = None if identity is None else read_identity(identity)
    engine = NvflareEngine(names, run_config_of(request).model_dump_json().encode(), address, own)
    told: set[str] = set()

    def look(status: EnrolmentStatus) -> None:
        news = {f"{name} is ready" for name in status.ready}
        news |= {f"{name} cannot take part: {why}" for name, why in status.troubles.items()}
        for line in sorted(news - told):
            note(line)
        told.update(news)

    try:
        kind = "without protection, on loopback alone" if own is None else "mutual TLS"
        note(f"listening on {address} and nowhere else, {kind}; waiting for {', '.join(names)}")
        engine.wait_for_all(look)
        note("all devices are ready")
        yield engine
    finally:
        engine.close()
