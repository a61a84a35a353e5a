"""A device of `spine fed-launch`: `python -m spinecli.remote.device`, with a `LaunchedDevice` on its standard input.

It serves until the server tells it to leave, or until its standard input closes: a launcher that dies takes its devices
with it.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from spinecli.artifacts.record import Record
from spinecli.federation.engines.nvflare.certificates import read_identity
from spinecli.federation.engines.nvflare.connection import Address, log_to
from spinecli.federation.engines.nvflare.site import Site

TRAINER = (sys.executable, "-m", "spinecli.remote.trainer")


class LaunchedDevice(Record):
    """What a launched device is told by its launcher."""

    device: str
    host: str
    port: int
    identity: Path
    """Directory of its certificate and key."""
    client: str
    """Its `Home` as JSON."""


def main() -> None:
    """Serve as the device that the first line of standard input describes."""
    launched = LaunchedDevice.model_validate_json(sys.stdin.readline())
    log_to(None)
    address, identity = Address(launched.host, launched.port), read_identity(launched.identity)
    site = Site(launched.device, address, identity, TRAINER, launched.client.encode())

    def wait_for_the_launchers_end() -> None:
        sys.stdin.read()
        site.stop()

    threading.Thread(target=wait_for_the_launchers_end, daemon=True).start()
    site.run()


if __name__ == "__main__":
    main()
