"""`spine fed-server`: fine-tune over devices on machines of their own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands.fed_launch_view import launched, split_opening
from spinecli.commands.flags import Out, Overwrite, Resume, from_config
from spinecli.console import Terminal
from spinecli.federation.config import FederateConfig

if TYPE_CHECKING:
    from spinecli.federation.engine import Engine

_OF_A_FLEET = frozenset(
    {"fleet", "devices", "engine", "clock", "plan", "partition", "evaluation", "evaluation_share", "limit"}
)
"""What is asked for where devices are simulated or started here, and their data dealt out."""

Devices = Annotated[str, typer.Option("--devices", help="Names of the devices of this run, separated by commas.")]
Listen = Annotated[str, typer.Option("--listen", help="Address of this machine to listen on: HOST or HOST:PORT.")]
Identity = Annotated[
    Path | None, typer.Option("--identity", help="Directory of the server's certificate and key.", show_default=False)
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Use no certificates; this works on 127.0.0.1 only.")]


@from_config(FederateConfig, without=_OF_A_FLEET)
def fed_server(
    config: FederateConfig,
    terminal: Terminal,
    out: Out,
    devices: Devices,
    listen: Listen,
    identity: Identity = None,
    insecure: Insecure = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Fine-tune MODEL over devices that join with `spine fed-device`; the run begins when all of them are ready."""
    from spinecli.remote.engines import require_nvflare

    require_nvflare("spine fed-server")
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.evaluation.quiet import quiet_libraries
    from spinecli.federation.split.request import split_request
    from spinecli.remote.address import parse_address, parse_names, require_protection
    from spinecli.remote.serve import open_server_request, serving

    address, names = parse_address(listen, "--listen"), parse_names(devices)
    require_protection(address, identity, insecure=insecure)
    stopwatch, output = Stopwatch(), OutputOptions(out, overwrite, resume)
    if not resume:
        check_output(output)
    with stopwatch("reading"), quiet_libraries(terminal.debug):
        request = open_server_request(config, names)
    for note in request.splits.notes:
        terminal.note(note)
    split = split_request(request) if config.splits else None
    asked = split or request
    terminal.note(f"{config.strategy} over {', '.join(names)}; {len(request.evaluation)} examples held out")
    if split is not None:
        terminal.note(split_opening(split))

    def connect(state: Path) -> AbstractContextManager[Engine]:
        return serving(asked, names, address, identity, state, terminal.note)

    launched(asked, output, stopwatch, terminal, connect)
