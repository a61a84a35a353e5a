"""`spine bench`: speed and memory of models side by side, in the engines that would run them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands.flags import OUTPUT, Overwrite, from_config
from spinecli.console import Terminal, table
from spinecli.evaluation.bench.config import BenchConfig

if TYPE_CHECKING:
    from rich.console import Group

    from spinecli.evaluation.bench.results import BenchResults

ResultsOut = Annotated[Path | None, typer.Option("--out", help="Directory for results.json.", rich_help_panel=OUTPUT)]


@from_config(BenchConfig)
def bench(config: BenchConfig, terminal: Terminal, out: ResultsOut = None, overwrite: Overwrite = False) -> None:
    """Measure speed and memory of models side by side on this machine, in torch and in llama.cpp.

    [bold]spine bench dense/ pruned/[/bold]

    [bold]spine bench dense/ pruned/ pruned-q8.gguf --engine llama.cpp --threads 4[/bold]
    """
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.evaluation.bench.run import bench as run_bench

    output = OutputOptions(out, overwrite) if out else None
    with terminal.context() as context:
        results, manifest = run_bench(config, output, context)
    if manifest:
        terminal.note(f"Wrote {', '.join(manifest.outputs)} to {out}.")
    terminal.result(results.model_dump(mode="json"), _tables(results))


def _tables(results: BenchResults) -> Group:
    """One table an engine, with a column a model; how it was measured stands below."""
    from rich.console import Group
    from rich.text import Text

    from spinecli.evaluation.bench.report import conditions, lines, title

    drawn = [
        part
        for engine in results.engines
        for part in (table(title(engine), ("", *(run.label for run in engine.runs)), lines(engine)), Text())
    ]
    return Group(*drawn, Text("\n".join(conditions(results)), style="dim"))
