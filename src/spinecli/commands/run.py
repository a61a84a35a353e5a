"""`spine run`: a chain of commands from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinecli.commands.flags import OUTPUT, Debug, Json, Quiet
from spinecli.console import Terminal, size, table


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file of named steps; each holds a command and its options.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Directory for the outputs of the steps, each under the step's name.", rich_help_panel=OUTPUT
        ),
    ],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the commands and the sizes to expect; run nothing.", rich_help_panel=OUTPUT
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the steps of RECIPE in turn. Steps that have not changed are skipped, and a killed chain continues.

    A step names an earlier one as its input: [bold]tune: {pruned: "${pruned}"}[/bold]. `spine inspect DIR --recipe`
    prints the chain that made a directory as such a recipe.
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.recipes.recipe import read_recipe
        from spinecli.recipes.run import StepResult, expected, run_recipe

        chain = read_recipe(recipe)
        if dry_run:
            steps = expected(chain, out)
            value = [
                {"name": each.step.name, "command": each.command_line, "exists": each.exists, "bytes": each.bytes}
                for each in steps
            ]
            rows = [
                (each.step.name, "-" if each.bytes is None else size(each.bytes), "yes" if each.exists else "no")
                for each in steps
            ]
            drawn = table("What would be written", ("step", "size", "there already"), rows)
            terminal.result({"steps": value}, *(each.command_line for each in steps), "", drawn)
            return

        def finished(done: StepResult) -> None:
            terminal.note(f"unchanged: {done.result.summary}" if done.unchanged else done.result.summary)

        with terminal.context() as context:
            results = run_recipe(chain, out, context, finished)
        value = [
            {
                "name": done.step.name,
                "out": str(done.result.path),
                "unchanged": done.unchanged,
                "summary": done.result.summary,
            }
            for done in results
        ]
        rows = [(done.step.name, "unchanged" if done.unchanged else "written", done.result.summary) for done in results]
        terminal.result({"steps": value}, table("", ("step", "", "what it is"), rows, words=range(3)))
