"""The engines beyond this process, by their names: what they need, and how a run starts one on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spinecli.errors import MissingPackageError

if TYPE_CHECKING:
    from spinecli.federation.engine import Connect, Engine
    from spinecli.federation.request import FederatedRequest

_FLOWER = "1.41."
"""The versions that the Flower engine is made for; it uses parts of Flower that change with every minor version."""


def require_nvflare(asked_by: str) -> None:
    """Raise MissingPackageError where NVFlare is not installed.

    Args:
        asked_by: the option or command that needs it.
    """
    if find_spec("nvflare") is None:
        raise MissingPackageError(f"{asked_by} needs NVFlare; install it with pip install 'spinecli[nvflare]'.")


def require_flower(asked_by: str) -> None:
    """Raise MissingPackageError where Flower is not installed in the version that is used.

    Args:
        asked_by: the option that needs it.
    """
    way_out = "install it with pip install 'spinecli[flower]'."
    if find_spec("flwr") is None:
        raise MissingPackageError(f"{asked_by} needs Flower; {way_out}")
    if not (found := version("flwr")).startswith(_FLOWER):
        raise MissingPackageError(f"{asked_by} needs Flower {_FLOWER}x, and {found} is here; {way_out}")


def require_engine(name: str) -> None:
    """Raise MissingPackageError where what the engine of this name needs is not installed."""
    if name == "nvflare":
        require_nvflare("--engine nvflare")
    elif name == "flower":
        require_flower("--engine flower")


def starting_devices(request: FederatedRequest, note: Callable[[str], None]) -> Connect | None:
    """Starts a process for each device when the run begins; None for the engine that simulates them in this process.

    Args:
        note: told in a line what runs where.

    Raises: OptionError if the fleet has more devices than this machine is asked to start.
    """
    if request.config.engine.name == "local":
        return None
    from spinecli.remote.client_dir import require_few

    require_few(request)

    def connect(state: Path) -> AbstractContextManager[Engine]:
        if request.config.engine.name == "flower":
            from spinecli.remote import launch_flower

            return launch_flower.on_this_machine(request, state, note)
        from spinecli.remote import launch

        return launch.on_this_machine(request, state, note)

    return connect
