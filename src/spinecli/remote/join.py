"""A device on a machine of its own: it connects to the server, and works until the run is over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from spinecli.errors import FederationError, OptionError
from spinecli.federation.engines.envelope import RUN_IS_OVER
from spinecli.federation.engines.nvflare.certificates import name_in, read_identity
from spinecli.federation.engines.nvflare.connection import Address, log_to
from spinecli.federation.engines.nvflare.names import SERVER, require_device_name
from spinecli.federation.engines.nvflare.site import STOPPED, Site
from spinecli.remote.client_config import ClientConfig
from spinecli.remote.device import TRAINER

_LOG_NAME = "device-log.txt"


def join(client: ClientConfig, address: Address, identity: Path | None, note: Callable[[str], None]) -> None:
    """Serve as a device until the run is over.

    Args:
        identity: directory of certificate and key, whose name is the device's; None goes without, under the name that
            `client` has.
        note: told in a line what changes.

    Raises: FederationError if the server sends this device away, and what reading an identity can raise.
    """
    own = None if identity is None else read_identity(identity)
    name = client.device if own is None else name_in(own)
    if name == SERVER:
        raise OptionError(f"{identity} is the server's; name the directory that was made for this device.")
    require_device_name(name)
    client.memory.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_to(client.memory / _LOG_NAME)
    note(f"{name} connects to {address}, {'without protection' if own is None else 'mutual TLS'}; Ctrl-C ends it")
    setup = client.model_copy(update={"device": name}).model_dump_json().encode()
    told = Site(name, address, own, TRAINER, setup, note).run()
    if told not in (RUN_IS_OVER, STOPPED):
        raise FederationError(f"The server refused {name}: {told}.")


def memory_of_this_machine() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
