"""Whether what remote devices need is installed."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from spinecli.errors import MissingPackageError

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
