"""A device of `spine fed-launch`: `python -m spinecli.remote.device`, with a `Launched` on its standard input.

It serves until the server tells it to leave, or until its standard input closes: a launcher that dies takes its devices
with it.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from spinecli.federation.engines.nvflare.certificates import read_identity
from spinecli.federation.engines.nvflare.line import Address, log_to
from spinecli.federation.engines.nvflare.site import Site

TRAINER = (sys.executable, "-m", "spinecli.remote.trainer")


class Launched(BaseModel):
    """What a launched device is told by its launcher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    host: str
    port: int
    identity: Path
    """Directory of its certificate and key."""
    home: str
    """Its `Home` as JSON."""


def main() -> None:
    """Serve as the device that the first line of standard input describes."""
    launched = Launched.model_validate_json(sys.stdin.readline())
    log_to(None)
    address, identity = Address(launched.host, launched.port), read_identity(launched.identity)
    site = Site(launched.device, address, identity, TRAINER, launched.home.encode())

    def wait_for_the_launchers_end() -> None:
        sys.stdin.read()
        site.stop()

    threading.Thread(target=wait_for_the_launchers_end, daemon=True).start()
    site.run()


if __name__ == "__main__":
    main()
