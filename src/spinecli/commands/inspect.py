"""`spine inspect`: what a directory is, and where it came from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands.flags import Debug, Json, Quiet
from spinecli.console import Terminal, number, size, table


def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory that a spine command wrote, or any checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every file against its recorded checksum.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Draw what was cut from each block into this .png, .svg or .pdf file.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --plot names.")] = False,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the options of the command that wrote it, as a file for --config."),
    ] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the chain of commands that made it, as a recipe for spine run.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what DIRECTORY is, the chain of steps back to the dense model, and the shape of every block."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.artifacts.picture_file import check_picture
        from spinecli.checkpoints.cut_picture import cuts_of, save_cut_picture
        from spinecli.checkpoints.inspection import inspect_directory
        from spinecli.errors import OptionError
        from spinecli.healing.curve import curve_of, draw
        from spinecli.recipes.recipe import last_config, recipe_of

        if print_config or recipe:
            if plot or verify or json or (print_config and recipe):
                raise OptionError("--print-config and --recipe print a file and nothing else; give only one of them.")
            typer.echo(recipe_of(directory).as_yaml() if recipe else last_config(directory), nl=False)
            return
        if plot:
            check_picture(plot, directory, overwrite=overwrite)
        found = inspect_directory(directory, verify=verify)
        if plot and not found.get("damaged"):
            curve = curve_of(directory)
            below = partial(draw, curve=curve) if curve else None
            save_cut_picture(cuts_of(directory), _title(found), plot, below)
            found["picture"] = str(plot)
        terminal.result(found, *_rendered(found))
        if found.get("damaged"):
            raise typer.Exit(1)


def _rendered(found: dict[str, Any]) -> list[Any]:
    drawn: list[Any] = []
    manifest = found.get("manifest")
    if manifest:
        drawn += [
            f"{found['directory']}: {manifest['kind']}, {manifest['summary']}",
            f"digest {manifest['digest']}",
            "",
        ]
        steps = [*manifest["lineage"], {**manifest, "reference": found["directory"]}]
        rows = [
            (str(index), step["kind"], step["command"] or "-", step["reference"], step["digest"][:12], step["summary"])
            for index, step in enumerate(steps)
        ]
        drawn += [table("Lineage", ("", "what", "command", "where", "digest", "result"), rows, words=range(6)), ""]
        settings = [(name, _setting(value)) for name, value in manifest["parameters"].items()]
        measured = manifest["measured"]
        settings += [("seed", str(manifest["seed"])), ("seconds", str(measured["seconds"]["total"]))]
        if measured["peak_memory_bytes"]:
            settings.append(("peak memory", size(measured["peak_memory_bytes"])))
        settings += [(f"{name} version", version) for name, version in measured["versions"].items()]
        drawn += [table("How it was made", ("", ""), settings), ""]
    else:
        drawn += [f"{found['directory']}: a checkpoint that no spine command wrote", ""]
    if blocks := found.get("blocks"):
        rows = [
            (
                str(block["index"]),
                str(block["from"]),
                str(block["heads"]),
                str(block["kv_heads"]),
                str(block["channels"]),
                number(block["parameters"]),
            )
            for block in blocks
        ]
        columns = ("block", "dense block", "heads", "KV heads", "channels", "parameters")
        drawn += [table(f"Blocks ({found['model_type']})", columns, rows), ""]
    if removed := found.get("removed_blocks"):
        drawn.append(f"removed blocks of the dense model, from 0: {', '.join(map(str, removed))}")
    if picture := found.get("picture"):
        drawn.append(f"what was cut where: {picture}")
    if "damaged" in found:
        damaged = found["damaged"]
        drawn += [f"{name}: {problem}" for name, problem in damaged.items()]
        drawn.append("all sums agree" if not damaged else f"{len(damaged)} files differ from their sums")
    return drawn


def _title(found: dict[str, Any]) -> str:
    """What a picture is of."""
    manifest = found.get("manifest")
    name = Path(found["directory"]).resolve().name
    return f"{name}: {manifest['summary']}" if manifest else name


def _setting(value: Any) -> str:
    """A parameter as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
