"""`spine fed-certify`: certificates by which a server and its devices know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinecli.commands.flags import Debug, Json, Quiet
from spinecli.console import Terminal


def fed_certify(
    directory: Annotated[Path, typer.Argument(help="Directory of the certificates; it is created if needed.")],
    devices: Annotated[str, typer.Option("--devices", help="Names of the devices, separated by commas.")],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or IP address at which devices reach the server; may be repeated."),
    ] = None,
    days: Annotated[
        int, typer.Option("--days", help="Number of days for which certificates are valid.", min=1, max=3650)
    ] = 365,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Create the certificates that DIRECTORY lacks: for an authority, the server, and each device."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.remote.engines import require_nvflare

        require_nvflare("spine fed-certify")
        from spinecli.federation.engines.nvflare.certificates import certify
        from spinecli.remote.address import parse_names

        made = certify(directory, parse_names(devices), host or [], days)
        places = [str(directory / name) for name in made]
        lines = [f"{place}: copy it to its machine, and nowhere else" for place in places]
        kept = f"{directory / 'authority'}: keep it away from every other machine; its key lets devices in"
        terminal.result({"made": places}, *(lines or ["nothing was missing"]), kept)
