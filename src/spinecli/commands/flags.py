"""A subcommand's flags, their help and completion, made from its config; and the flags that every command has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape

from spinecli.config import Config, ConfigField, read_config
from spinecli.console import Terminal
from spinecli.errors import OptionError

OUTPUT = "Output"
MESSAGES = "Messages and configuration"
_WHOLE = "Directory to write; it appears whole or not at all."

Out = Annotated[Path, typer.Option("--out", help=_WHOLE, rich_help_panel=OUTPUT)]
OutUnlessDry = Annotated[Path | None, typer.Option("--out", help=_WHOLE, rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that a spine command wrote.", rich_help_panel=OUTPUT)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a killed run of the same command.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=OUTPUT)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.", rich_help_panel=MESSAGES),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.", rich_help_panel=MESSAGES)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=MESSAGES)]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file to read options from; flags override it.", rich_help_panel=MESSAGES),
]
PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config", help="Print the options as a file for --config, and run nothing.", rich_help_panel=MESSAGES
    ),
]

_METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH"}


def from_config(
    kind: type[Config], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a subcommand of a function of a config, a terminal, and options that are the command's own.

    The function is called with the config that the flags and `--config` ask for, inside the terminal's reporting of
    errors. An own parameter without a default has to be given, and `out` also where only --dry-run does without.

    Args:
        without: names of fields that this command has no flags for.
    """

    def made(body: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(body, include_extras=True)
        own = list(inspect.signature(body).parameters.values())[2:]
        dry = any(each.name == "dry_run" for each in own)
        writes = any(each.name == "out" and (dry or each.default is inspect.Parameter.empty) for each in own)

        def run(**values: Any) -> None:
            file, printed = values.pop("config"), values.pop("print_config")
            shared = {name: values.pop(name) for name in ("json", "quiet", "debug")}
            mine = {parameter.name: values.pop(parameter.name) for parameter in own}
            resumable = None if mine.get("dry_run") or "resume" not in mine else mine.get("out")
            terminal = Terminal(**shared, resumable=resumable)
            with terminal.reporting_errors():
                config = read_config(kind, file, _given(values))
                if printed:
                    typer.echo(config.as_yaml(), nl=False)
                    return
                if writes and mine["out"] is None and not mine.get("dry_run"):
                    add = ", or add --dry-run to write nothing" if dry else ""
                    raise OptionError(f"Name the directory to write with --out{add}.")
                for missed in (each.name for each in own if each.default is each.empty and mine[each.name] is None):
                    raise OptionError(f"--{missed.replace('_', '-')} is missing: {get_args(hints[missed])[1].help}")
                body(config, terminal, **mine)

        flags = [_parameter(found) for found in kind.fields() if found.name not in without]
        rest = [_keyword(each.name, _optional(hints[each.name]), _default(each)) for each in own]
        shared = {"config": (ConfigFile, None), "print_config": (PrintConfig, False)}
        shared |= {"json": (Json, False), "quiet": (Quiet, False), "debug": (Debug, False)}
        rest += [_keyword(name, annotation, default) for name, (annotation, default) in shared.items()]
        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.config = kind  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*flags, *rest)}
        run.__signature__ = inspect.Signature([*flags, *rest])  # type: ignore[attr-defined]
        return run

    return made


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _optional(annotation: Any) -> Any:
    """A type that may also be None, so that a flag which has to be given can be missed after --print-config."""
    kind, option = get_args(annotation)
    return annotation if kind is bool else Annotated[kind | None, option]


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is inspect.Parameter.empty else parameter.default


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed. An option that was left out is None, one that may be repeated is empty."""
    return {name: value for name, value in values.items() if value is not None and value != []}


def _parameter(found: ConfigField) -> inspect.Parameter:
    """The flag of a field. Its default is None, so that it can be told whether it was typed."""
    words = found.option.help
    if default := found.default_in_words:
        words += f" Default: {default}."
    words = escape(words)
    if found.required:
        words += " [red]Required.[/red]"
    complete = _completing(found.choices) if found.choices else None
    if found.option.argument:
        given: Any = typer.Argument(help=words, metavar=found.flag, show_default=False)
    else:
        given = typer.Option(
            f"{found.flag}/--no-{found.flag[2:]}" if found.kind is bool else found.flag,
            help=words,
            metavar=_METAVARS.get(found.kind, "|".join(found.choices) or "TEXT") if found.kind is not bool else None,
            rich_help_panel=found.panel or None,
            show_default=False,
            autocompletion=complete,
        )
    return _keyword(found.name, Annotated[_typed(found) | None, given], None)


def _completing(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _typed(found: ConfigField) -> Any:
    """What typer makes of a typed word. Most stay words: the config says more plainly what is wrong with them."""
    if found.kind in (bool, Path):
        return found.kind
    return list[str] if found.repeated else str
