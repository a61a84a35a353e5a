"""`spine fed-device`: take part in a run with this machine's model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinecli.commands import fed_launch_options as federated
from spinecli.commands import options
from spinecli.console import Terminal


def fed_device(
    model: Annotated[str, typer.Argument(help="Checkpoint, the same as the server's: a directory or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="This device's own examples; they do not leave it.")],
    server: Annotated[str, typer.Option("--server", help="Where the server listens: HOST or HOST:PORT.")],
    identity: Annotated[
        Path | None,
        typer.Option("--identity", help="Directory of this device's certificate and key.", show_default=False),
    ] = None,
    state: Annotated[
        Path, typer.Option("--state", help="Directory for what it remembers from round to round, and its log.")
    ] = Path("spine-device"),
    text_column: federated.TextColumn = None,
    pair_column: federated.PairColumn = None,
    label_column: federated.LabelColumn = None,
    device_class: Annotated[
        str,
        typer.Option(
            "--class",
            help="What kind of device this is; deploying and reports go by it. Letters, digits, - and _.",
        ),
    ] = "device",
    memory_gb: Annotated[
        float | None,
        typer.Option("--memory", help="Gigabytes that training may take. Default: all.", min=0.001, show_default=False),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Do without certificates, on 127.0.0.1 alone.")] = False,
    name: Annotated[
        str | None,
        typer.Option("--name", help="This device's name with --insecure; else its certificate's.", show_default=False),
    ] = None,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train MODEL on this machine's examples for a server, until its run is over. Only what is learned is sent."""
    terminal = Terminal(quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.remote.available import require_nvflare

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
            model=str(Path(model).resolve()) if Path(model).is_dir() else model,
            data=str(Path(data).resolve()) if Path(data).exists() else data,
            text_column=text_column,
            pair_column=pair_column,
            label_column=label_column,
            memory=state.resolve(),
            device_class=device_class,
            memory_bytes=memory_of_this_machine() if memory_gb is None else int(memory_gb * 1e9),
            compute_device=device,
        )
        join(home, address, identity, terminal.note)
        terminal.result({"finished": True}, "the run is over")
