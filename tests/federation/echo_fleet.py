"""Echoing devices around an engine, and what tests say to them. Needs NVFlare."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spinecli.federation.engine import Job, Lost, Reply
from spinecli.federation.engines.enrolment_status import EnrolmentStatus
from spinecli.federation.engines.loopback import free_port
from spinecli.federation.engines.nvflare.certificates import read_identity
from spinecli.federation.engines.nvflare.connection import Address, log_to
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.engines.nvflare.members import Timeouts
from spinecli.federation.messages import Message

NAMES = ("slow-00", "slow-01", "fast-00")
ROLES = ("rogue", "flood", "crowd")
"""Of devices that are not honest, see `echo_site`."""
ECHO = Path(__file__).with_name("echo_site.py")
TIMEOUTS = Timeouts(gone=2.0, silent=30.0)
SOON = 120.0
"""A busy machine needs its time to start processes."""


class Fleet:
    """Echoing devices around an engine, all ended at the end."""

    def __init__(self, folder: Path, identities: Path) -> None:
        self.folder = folder
        self.identities = identities
        self.port = free_port()
        self.sites: list[subprocess.Popen[str]] = []
        self.by_name: dict[str, subprocess.Popen[str]] = {}
        self.engines: list[NvflareEngine] = []
        log_to(folder / "server.txt")

    def serve(self, run_config: bytes = b"welcome", names: Sequence[str] = NAMES, **options: Any) -> NvflareEngine:
        identity = read_identity(self.identities / "server")
        address = Address("127.0.0.1", self.port)
        self.engines.append(NvflareEngine(names, run_config, address, identity, timeouts=TIMEOUTS, **options))
        return self.engines[-1]

    def start(self, device: str, identity: str | None = None, host: str = "127.0.0.1") -> subprocess.Popen[str]:
        role, shown = (identity, device) if identity in ROLES else (device, identity or device)
        command = [sys.executable, str(ECHO), role, str(self.port), self._identity(shown), host]
        log = (self.folder / f"{device}-{len(self.sites)}.txt").open("w")
        site = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.sites.append(site)
        if identity is None:
            self.by_name[device] = site
        return site

    def _identity(self, identity: str) -> str:
        return identity if identity == "none" else str(self.identities / identity)

    def newest(self, device: str) -> subprocess.Popen[str]:
        return self.by_name[device]

    def gather(self, engine: NvflareEngine) -> list[subprocess.Popen[str]]:
        sites = [self.start(name) for name in NAMES]
        wait_for(engine)
        return sites

    def end(self) -> None:
        for engine in self.engines:
            engine.close()
        for site in self.sites:
            site.kill()
            site.communicate()


def wait_for(engine: NvflareEngine) -> None:
    limit = time.monotonic() + SOON

    def look(status: EnrolmentStatus) -> None:
        assert not status.troubles
        assert time.monotonic() < limit

    engine.wait_for_all(look)


def eventually(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.1)


def job(device: str, do: str = "echo", number: int = 0) -> Job:
    return Job(device, do, number, Message({"to": device}, {"value": torch.arange(100.0)}))


def all_jobs(number: int = 0) -> list[Job]:
    return [job(name, number=number) for name in NAMES]


def reason(outcome: Reply | Lost) -> str:
    return outcome.reason if isinstance(outcome, Lost) else "answered"


def listeners(port: int) -> set[str]:
    """Addresses at which something listens on a port."""
    found = set()
    for table, width in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:
                quad = bytes.fromhex(address[-8:])[::-1]
                mapped = width == 8 or address.startswith("0000000000000000FFFF0000")
                found.add(socket.inet_ntoa(quad) if mapped else "any")
    return found
