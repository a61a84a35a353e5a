"""`spine demo`: the whole chain on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinecli.commands import options
from spinecli.console import Terminal


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for what the steps write.")] = Path("spine-demo"),
    sparsity: Annotated[
        float, typer.Option("--sparsity", help="Share of the block parameters to remove, between 0 and 1.")
    ] = 0.5,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prune, tune and evaluate a small built-in language model: what spine does, in about a minute, with no network."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.commands.eval import comparison_table
        from spinecli.demo.chain import run_demo

        with terminal.progress() as progress:
            result = run_demo(out, sparsity, lambda line: terminal.note(f"$ {line}"), progress)
        dense, pruned, tuned = (model.perplexity[0].perplexity for model in result.evaluation.models)
        verdict = (
            f"Cutting {result.pruned.report['achieved_sparsity']:.0%} of the block parameters took perplexity from "
            f"{dense:.2f} to {pruned:.2f}; tuning, without training, brought it back to {tuned:.2f}."
        )
        value = {
            "out": str(out),
            "perplexity": {"dense": dense, "pruned": pruned, "tuned": tuned},
            "evaluation": result.evaluation.model_dump(mode="json"),
        }
        hint = f"Look around: spine inspect {out / 'tuned'}, {out / 'results' / 'report.html'}"
        terminal.result(value, comparison_table(result.evaluation), "", verdict, hint)
