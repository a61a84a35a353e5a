"""Who has knocked and was not let in: connections that end before their TLS handshake does.

gRPC completes or refuses handshakes by itself and tells nobody who failed. But it asks for the server's certificate at
the beginning of each, and at that moment the connection is open and its peer can be looked up. A peer from which no
stream has come when its connection is gone, or after a while, was refused.
"""

from __future__ import annotations

import logging
import threading
import time
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

import psutil

_LOG = logging.getLogger("nvflare.spine")
_GLANCE_SECONDS = 1.0
_HANDSHAKE_SECONDS = 20.0
"""After which a connection that says nothing is taken for a stranger's."""
_MOST_ADDRESSES = 1000
"""That are remembered, so that a crowd of strangers does not fill the memory."""
_LOOKUPS_A_SECOND = 20

Peer = tuple[str, int]
"""Address and port of the other side."""


class Handshakes:
    """Handshakes on one port of this process; every address that was refused is logged once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._pending: dict[Peer, float] = {}
        self._admitted: set[Peer] = set()
        self._told: set[str] = set()
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()
        self._lookups: list[float] = []

    def began(self) -> None:
        """A handshake begins; called in a thread of gRPC, which waits."""
        now = time.monotonic()
        with self._lock:
            self._lookups = [moment for moment in self._lookups if now - moment < 1.0]
            if len(self._lookups) >= _LOOKUPS_A_SECOND or self._closed.is_set():
                return
            self._lookups.append(now)
            open_now = self._open()
            self._admitted &= open_now
            for peer in open_now - self._admitted - self._pending.keys():
                self._pending[peer] = now
            if self._pending and self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="handshakes", daemon=True)
                self._watcher.start()

    def admitted(self, name: str) -> None:
        """A stream has come from a peer, as gRPC names it: its handshake is complete."""
        peer = peer_of(name)
        with self._lock:
            self._pending.pop(peer, None)
            self._admitted.add(peer)

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        """Look after handshakes until none is under way."""
        while not self._closed.wait(_GLANCE_SECONDS):
            with self._lock:
                open_now, now = self._open(), time.monotonic()
                for peer, since in list(self._pending.items()):
                    if peer not in open_now or now - since > _HANDSHAKE_SECONDS:
                        del self._pending[peer]
                        self._admitted |= {peer} & open_now  # said once, whatever becomes of it
                        self._tell(peer[0])
                if not self._pending:
                    self._watcher = None
                    return

    def _tell(self, address: str) -> None:
        if address in self._told or len(self._told) >= _MOST_ADDRESSES:
            return
        self._told.add(address)
        _LOG.warning("refused a connection from %s: it showed no certificate of this run's authority", address)

    def _open(self) -> set[Peer]:
        """The other sides of this process's connections on the port."""
        connections = psutil.Process().net_connections("tcp")
        return {
            _plain(found.raddr.ip, found.raddr.port)
            for found in connections
            if found.raddr and found.laddr.port == self._port
        }


def peer_of(name: str) -> Peer:
    """The peer that gRPC calls so: `ipv4:10.0.0.1:50000`, `ipv6:%5B::1%5D:50000`."""
    address, _, port = unquote(name).partition(":")[2].rpartition(":")
    return _plain(address.strip("[]"), int(port))


def _plain(address: str, port: int) -> Peer:
    """An address as it is written without the prefix that IPv4 has on a socket for both."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return str(found), port
