"""The `spine` command: names the subcommands and imports nothing heavy."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from spinecli import __version__
from spinecli.commands.bench import bench
from spinecli.commands.demo import demo
from spinecli.commands.eval import evaluate
from spinecli.commands.export import export
from spinecli.commands.fed_certify import fed_certify
from spinecli.commands.fed_device import fed_device
from spinecli.commands.fed_launch import fed_launch
from spinecli.commands.fed_server import fed_server
from spinecli.commands.heal import heal
from spinecli.commands.inspect import inspect
from spinecli.commands.plan import plan
from spinecli.commands.prune import prune
from spinecli.commands.run import run
from spinecli.commands.sweep import sweep
from spinecli.commands.tune import tune

# read when torch is loaded: threads that spin while they wait slow down a busy machine, themselves included
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="spine",
    help="Make language models fit small devices and keep them learning there.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spine {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make language models fit small devices and keep them learning there."""


app.command("prune")(prune)
app.command("tune")(tune)
app.command("heal")(heal)
app.command("sweep")(sweep)
app.command("plan")(plan)
app.command("fed-launch")(fed_launch)
app.command("fed-certify")(fed_certify)
app.command("fed-server")(fed_server)
app.command("fed-device")(fed_device)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("export")(export)
app.command("run")(run)
app.command("inspect")(inspect)
app.command("demo")(demo)
