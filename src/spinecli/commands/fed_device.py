"""`spine fed-device`: take part in a run with this machine's model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinecli.commands.flags import from_config
from spinecli.console import Terminal
from spinecli.remote.config import DeviceConfig

Server = Annotated[str, typer.Option("--server", help="Address of the server: HOST or HOST:PORT.")]
Identity = Annotated[
    Path | None,
    typer.Option("--identity", help="Directory of this device's certificate and key.", show_default=False),
]
State = Annotated[
    Path, typer.Option("--state", help="Directory for what this device keeps from round to round, and for its log.")
]
DeviceClass = Annotated[
    str,
    typer.Option(
        "--class",
        help="Class of this device, for --deploy and reports; it may have letters, digits, - and _.",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory", help="Memory that training may take, in gigabytes. Default: all.", min=0.001, show_default=False
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Use no certificates; this works on 127.0.0.1 only.")]
Name = Annotated[
    str | None,
    typer.Option(
        "--name", help="Name of this device with --insecure; otherwise its certificate says it.", show_default=False
    ),
]


@from_config(DeviceConfig)
def fed_device(
    config: DeviceConfig,
    terminal: Terminal,
    server: Server,
    identity: Identity = None,
    state: State = Path("spine-device"),
    device_class: DeviceClass = "device",
    memory: Memory = None,
    insecure: Insecure = False,
    name: Name = None,
) -> None:
    """Train MODEL on this machine's examples for a server, until its run is over. Only what is learned is sent."""
    from spinecli.remote.engines import require_nvflare

    require_nvflare("spine fed-device")
    from spinecli.errors import OptionError
    from spinecli.federation.engines.nvflare.names import require_class_name
    from spinecli.remote.address import parse_address, require_protection
    from spinecli.remote.client_config import ClientConfig
    from spinecli.remote.join import join, memory_of_this_machine

    address = parse_address(server, "--server")
    require_protection(address, identity, insecure=insecure)
    require_class_name(device_class)
    if insecure and name is None:
        raise OptionError("--insecure has no certificate to take a name from; give one with --name.")
    home = ClientConfig(
        device=name or "",
        model=str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
        data=str(Path(config.data).resolve()) if Path(config.data).exists() else config.data,
        columns=config.columns,
        memory=state.resolve(),
        device_class=device_class,
        memory_bytes=memory_of_this_machine() if memory is None else int(memory * 1e9),
        compute_device=config.device,
    )
    join(home, address, identity, terminal.note)
    terminal.result({"finished": True}, "the run is over")
