"""The server's end of gRPC: NVFlare's driver, made fit for a port that others can reach.

* Connections that fail in the TLS handshake are noted, see `handshakes`.
* A certificate has a few connections at a time, so that a device cannot multiply what it may send.
* A connection's next message is taken when the one before is dealt with. NVFlare would queue whatever comes; a device
  that sends faster than the server works now waits, as gRPC's flow control makes it.

So what devices can make the server hold is bounded: for each connection a message that is dealt with and one that
arrives, each of them no longer than the limit in settings/comm_config.json.
"""

from __future__ import annotations

import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from nvflare.fuel.f3 import communicator
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.connection import Connection, FrameReceiver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.grpc.streamer_pb2_grpc import add_StreamerServicer_to_server
from nvflare.fuel.f3.drivers.grpc_driver import GrpcDriver, Servicer
from nvflare.fuel.f3.drivers.net_utils import get_address, ssl_required

from spinecli.federation.engines.nvflare.handshakes import Handshakes

SCHEME = "spine"
"""Of the server's address; devices come with NVFlare's own `grpc`."""
CONNECTIONS_OF_ONE = 3
"""Of one certificate: a device's, the one that it had before it was started anew, and one to spare."""


class InTurn(FrameReceiver):  # type: ignore[misc]
    """Deals with a frame before the next is taken from the connection."""

    def __init__(self, receiver: Any) -> None:
        self._manager, self._connection = receiver.conn_manager, receiver.conn

    def process_frame(self, frame: Any) -> None:
        """Deal with it in the thread that reads the connection."""
        self._connection.last_activity = time.time()
        self._manager.process_frame_task(self._connection, frame)


class ServerDriver(GrpcDriver):  # type: ignore[misc]
    """Listens for devices."""

    def __init__(self) -> None:
        super().__init__()
        self._handshakes: Handshakes | None = None

    @staticmethod
    def supported_transports() -> list[str]:
        """The scheme that stands for this driver."""
        return [SCHEME]

    def listen(self, connector: ConnectorInfo) -> None:
        """Serve until the driver is shut down."""
        self.connector = connector
        self.server = _Listener(self, connector)
        params = connector.params
        secure = ssl_required(params)
        if secure:
            self._handshakes = Handshakes(int(params[DriverParams.PORT.value]))
        self.server.open(get_address(params), _credentials(params, self._handshakes) if secure else None)

    def add_connection(self, connection: Connection) -> None:
        """A stream has come in. Raises CommError if its certificate has enough of them."""
        properties = connection.get_conn_properties()
        if self._handshakes is not None:
            self._handshakes.admitted(properties[DriverParams.PEER_ADDR.value])
        name = properties.get(DriverParams.PEER_CN.value)
        with self.conn_lock:
            names = [each.get_conn_properties().get(DriverParams.PEER_CN.value) for each in self.connections.values()]
        if name is not None and names.count(name) >= CONNECTIONS_OF_ONE:
            raise CommError(CommError.ERROR, f"{name} has {CONNECTIONS_OF_ONE} connections already")
        super().add_connection(connection)
        connection.register_frame_receiver(InTurn(connection.frame_receiver))

    def shutdown(self) -> None:
        """Stop listening."""
        if self._handshakes is not None:
            self._handshakes.close()
        super().shutdown()


class _Listener:
    """A gRPC server with NVFlare's service."""

    def __init__(self, driver: ServerDriver, connector: ConnectorInfo) -> None:
        self.driver, self.connector = driver, connector
        workers = futures.ThreadPoolExecutor(max_workers=driver.max_workers)
        self._server = grpc.server(workers, options=driver.options)
        add_StreamerServicer_to_server(Servicer(self), self._server)

    def open(self, address: str, credentials: Any) -> None:
        """Listen until `shutdown`."""
        if credentials is None:
            self._server.add_insecure_port(address)
        else:
            self._server.add_secure_port(address, credentials)
        self._server.start()
        self._server.wait_for_termination()

    def shutdown(self) -> None:
        """Stop listening."""
        self._server.stop(grace=0.5)


def register() -> None:
    """Make NVFlare find the driver by its scheme."""
    if communicator.driver_mgr.find_driver_class(SCHEME) is None:
        communicator.driver_mgr.register(ServerDriver)


def _credentials(params: dict[str, Any], handshakes: Handshakes | None) -> Any:
    """Mutual TLS: without a certificate of the authority nobody comes in."""
    authority, certificate, key = (
        Path(params[name.value]).read_bytes()
        for name in (DriverParams.CA_CERT, DriverParams.SERVER_CERT, DriverParams.SERVER_KEY)
    )
    configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)

    def asked() -> None:
        """The certificate has not changed; but somebody is at the door."""
        if handshakes is not None:
            handshakes.began()

    return grpc.dynamic_ssl_server_credentials(configuration, asked, require_client_authentication=True)
