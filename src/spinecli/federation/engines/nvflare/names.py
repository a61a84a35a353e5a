"""Names on the line: the server's, those of devices, and those of their processes."""

from __future__ import annotations

import re
import secrets

from spinecli.errors import OptionError
from spinecli.federation.bounds import CLASS_NAME

SERVER = "server"
_DEVICE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,59}$")
_RESERVED = {SERVER, "authority", "spine"}


def require_device_name(name: str) -> None:
    """Raise OptionError if a device cannot be called so."""
    if not _DEVICE.fullmatch(name) or name.casefold() in _RESERVED:
        raise OptionError(
            f"A device cannot be called {name!r}; take up to 60 letters, digits, - and _, and not "
            f"{', '.join(sorted(_RESERVED))}."
        )


def require_class_name(name: str) -> None:
    """Raise OptionError if a class of devices cannot be called so."""
    if not re.fullmatch(CLASS_NAME, name):
        raise OptionError(f"A class cannot be called {name!r}; give --class up to 40 letters, digits, - and _.")


def cell_name(device: str) -> str:
    """A name for a new process of a device."""
    return f"{device}.{secrets.token_hex(4)}"


def device_of(cell: str) -> str:
    """Whose process a cell is."""
    return cell.partition(".")[0]
