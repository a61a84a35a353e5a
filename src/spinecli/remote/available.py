"""Whether what remote devices need is installed."""

from __future__ import annotations

from importlib.util import find_spec

from spinecli.errors import MissingPackageError


def require_nvflare(asked_by: str) -> None:
    """Raise MissingPackageError where NVFlare is not installed.

    Args:
        asked_by: the option or command that needs it.
    """
    if find_spec("nvflare") is None:
        raise MissingPackageError(f"{asked_by} needs NVFlare; install it with pip install 'spinecli[nvflare]'.")
