"""Where a server listens, who may come, and that the line is protected: what users type, checked.

Nothing here imports torch.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from spinecli.errors import OptionError
from spinecli.federation.engines.nvflare.connection import Address
from spinecli.federation.engines.nvflare.names import require_device_name

DEFAULT_PORT = 8002


def parse_address(text: str, option: str) -> Address:
    """HOST or HOST:PORT as an address. Raises OptionError."""
    host, _, port = text.partition(":")
    number = port or str(DEFAULT_PORT)
    if not host or not number.isdecimal() or not 1 <= int(number) <= 65535:
        raise OptionError(
            f"{option} {text!r} is not an address; write HOST:PORT, for example 192.168.1.10:{DEFAULT_PORT}."
        )
    return Address(host, int(number))


def is_loopback(address: Address) -> bool:
    """Whether an address is reached from this machine alone."""
    if address.host == "localhost":
        return True
    try:
        return ip_address(address.host).is_loopback
    except ValueError:
        return False


def require_protection(address: Address, identity: Path | None, *, insecure: bool) -> None:
    """Raise OptionError unless there is an identity, or the user does without one on loopback."""
    if insecure and not is_loopback(address):
        raise OptionError(f"--insecure is for this machine only, not for {address}; name an --identity.")
    if insecure == (identity is not None):
        raise OptionError(
            "Name the directory of the certificate and key with --identity; spine fed-certify creates it. "
            "Without one, --insecure works on 127.0.0.1 only."
        )


def parse_names(text: str) -> list[str]:
    """Device names from a list with commas. Raises OptionError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        require_device_name(name)
    if len({name.casefold() for name in names}) < len(names):
        raise OptionError(f"--devices {text} names a device twice; give each its own name.")
    return names
