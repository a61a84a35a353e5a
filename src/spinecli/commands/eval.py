"""`spine eval`: measure models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands.flags import OUTPUT, Overwrite, from_config
from spinecli.console import Terminal, table
from spinecli.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    from rich.console import Group

    from spinecli.evaluation.results import Evaluation

ReportOut = Annotated[
    Path | None,
    typer.Option("--out", help="Directory for results.json, report.html and a picture.", rich_help_panel=OUTPUT),
]


@from_config(EvaluateConfig)
def evaluate(config: EvaluateConfig, terminal: Terminal, out: ReportOut = None, overwrite: Overwrite = False) -> None:
    """Measure models side by side: perplexity, lm-eval tasks, labelled examples, speed and memory.

    If no measure is named, it takes speed, and for language models perplexity on a built-in text.

    [bold]spine eval tuned/ --against dense/ --perplexity text.txt --latency --out results/[/bold]

    [bold]spine eval joined/ --against other/ --labelled reviews/ --latency --out results/[/bold]
    """
    from spinecli.evaluation.measures import check_measures

    # before all that is imported to measure: a misspelt name is told at once
    check_measures(config)

    from spinecli.artifacts.directory import OutputOptions
    from spinecli.evaluation.run import evaluate as run_evaluate

    output = OutputOptions(out, overwrite) if out else None
    with terminal.context() as context:
        evaluation, manifest = run_evaluate(config, output, context)
    if manifest:
        terminal.note(f"Wrote {', '.join(manifest.outputs)} to {out}.")
    terminal.result(evaluation.model_dump(mode="json"), comparison_table(evaluation))


def comparison_table(evaluation: Evaluation) -> Group:
    """One line a figure; beside every model but the first, its ratio to the first. How it was measured stands below."""
    from rich.console import Group
    from rich.text import Text

    from spinecli.evaluation.report import comparison_lines, conditions

    columns, rows = comparison_lines(evaluation)
    # not the table's own caption, which would be wrapped to the table's width
    return Group(table("", columns, rows), Text("\n".join(conditions(evaluation)), style="dim"))
