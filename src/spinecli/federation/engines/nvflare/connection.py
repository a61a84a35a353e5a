"""One process's end of the line: an NVFlare cell that carries envelopes, and refuses everything else.

A device's process is the cell `<device>.<process>`. NVFlare's transport lets it connect under that name only if the
certificate it has shown is issued to `<device>`; the process part is new with every start.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, Encoding, MessageHeaderKey, MessagePropKey
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.stats_pool import StatsPoolManager
from nvflare.fuel.utils.config_service import ConfigService

from spinecli.errors import FederationError
from spinecli.federation.engines.nvflare.certificates import Identity
from spinecli.federation.engines.nvflare.driver import SCHEME, register
from spinecli.federation.engines.nvflare.names import SERVER

_CHANNEL = "spine"
_LOG = logging.getLogger("nvflare.spine")

Receive = Callable[[str, str, bytes], None]
"""Hears of an envelope: from which cell, its topic, its bytes."""
Notice = Callable[[str], None]
"""Hears the name of a cell."""


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def require_free(self) -> None:
        """Raise FederationError if the server could not listen there."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise FederationError(
                    f"The server cannot listen on {self} ({error.strerror or error}); name another address."
                ) from error


class Connection:
    """An open cell.

    Args:
        name: of the cell; SERVER listens, every other one connects.
        identity: certificate and key; None leaves the line unprotected.
        receive: called for every envelope, in threads of NVFlare.
        connected: called when a peer has connected.
        gone: called when a peer has gone.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        identity: Identity | None,
        receive: Receive,
        connected: Notice,
        gone: Notice,
    ) -> None:
        settings = resources.files("spinecli.federation.engines.nvflare") / "settings"
        ConfigService.initialize({}, [str(settings)])
        register()
        self._name = name
        self._receive = receive
        known = set(StatsPoolManager.pools)
        self._cell = CoreCell(
            fqcn=name,
            root_url=f"{SCHEME if name == SERVER else 'grpc'}://{address}",
            secure=identity is not None,
            credentials={} if identity is None else _credentials(identity, server=name == SERVER),
        )
        self._pools = set(StatsPoolManager.pools) - known
        self._cell.add_incoming_filter("*", "*", self._refuses)
        self._cell.register_request_cb(_CHANNEL, "*", self._arrived)
        self._cell.set_cell_connected_cb(lambda agent: connected(agent.get_fqcn()))
        self._cell.set_cell_disconnected_cb(lambda agent: gone(agent.get_fqcn()))

    def open(self) -> None:
        """Listen, or connect and go on trying to."""
        self._cell.start()

    def send(self, cell: str, topic: str, envelope: bytes) -> bool:
        """Hand an envelope to the transport; False if the cell is not connected."""
        errors = self._cell.fire_and_forget(_CHANNEL, topic, cell, Message({}, envelope), optional=True)
        return not errors.get(cell)

    def close(self) -> None:
        """Say goodbye and free the port, and the name: NVFlare keeps closed cells in lists of the whole process."""
        self._cell.stop()
        CoreCell.ALL_CELLS.pop(self._name, None)
        for pool in self._pools:
            StatsPoolManager.pools.pop(pool, None)

    def _arrived(self, message: Any) -> None:
        origin, topic = (message.get_header(key) for key in (MessageHeaderKey.ORIGIN, MessageHeaderKey.TOPIC))
        self._receive(origin, topic, bytes(message.payload or b""))

    def _refuses(self, message: Any) -> bool:
        """Whether a message is dropped: one that is passed on for others, pretends, or is to be decoded.

        NVFlare would route between devices, and decode structured payloads before anyone has looked at them.
        """
        header = message.get_header
        peer = message.get_prop(MessagePropKey.ENDPOINT).name
        topic = header(MessageHeaderKey.TOPIC)
        plain = header(MessageHeaderKey.PAYLOAD_ENCODING) in (None, Encoding.BYTES, Encoding.NONE)
        goodbye = (header(MessageHeaderKey.CHANNEL), topic) == (CellChannel.CELLNET, CellChannelTopic.Bye)
        known = goodbye or header(MessageHeaderKey.CHANNEL) == _CHANNEL
        own = header(MessageHeaderKey.DESTINATION) == self._name and header(MessageHeaderKey.ORIGIN) == peer
        if plain and known and own and not header(MessageHeaderKey.SECURE, False):
            return False
        _LOG.warning("refused a message of %s on topic %r", peer, topic)
        return True


def log_to(path: Path | None) -> None:
    """Write NVFlare's log to a file, or to stderr; by itself it says only what went wrong."""
    logger = logging.getLogger("nvflare")
    handler = logging.StreamHandler() if path is None else logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _credentials(identity: Identity, *, server: bool) -> dict[str, str]:
    certificate, key = (
        (DriverParams.SERVER_CERT, DriverParams.SERVER_KEY)
        if server
        else (DriverParams.CLIENT_CERT, DriverParams.CLIENT_KEY)
    )
    return {
        DriverParams.CA_CERT.value: str(identity.authority),
        certificate.value: str(identity.certificate),
        key.value: str(identity.key),
    }
