"""`spine sweep`: prune a model in several ways and by several ratios, and draw what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spinecli.commands.flags import Out, Overwrite, Resume, from_config
from spinecli.console import Terminal, number, table
from spinecli.evaluation.sweep.config import SweepConfig

if TYPE_CHECKING:
    from rich.console import Group

    from spinecli.evaluation.sweep.results import SweepResults, SweepRow


@from_config(SweepConfig)
def sweep(
    config: SweepConfig, terminal: Terminal, out: Out, overwrite: Overwrite = False, resume: Resume = False
) -> None:
    """Prune MODEL at several sparsities and with several methods, scoring it once per method, and compare the results.

    [bold]spine sweep MODEL --sparsity 0.1..0.5 --methods spine,comp --latency --out sweep/[/bold]
    """
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.evaluation.sweep.request import open_request
    from spinecli.evaluation.sweep.run import sweep as run_sweep

    output = OutputOptions(out, overwrite, resume)
    if not resume:
        check_output(output)
    with terminal.context() as context:
        request = open_request(config, context)
        tokens = request.calibration
        terminal.note(
            f"{len(request.points)} points, calibrated on {tokens.rows} rows of {tokens.length} tokens, "
            f"{tokens.frame}: {tokens.description}"
        )
        manifest, results = run_sweep(request, output, context)
    measured = manifest.measured.model_dump(mode="json")
    value = {"out": str(out), **results.model_dump(mode="json"), "measured": measured}
    written = dict.fromkeys(name.partition("/")[0] for name in manifest.outputs)
    terminal.result(value, _drawn(results), f"{out}: {', '.join(written)}")


def _drawn(results: SweepResults) -> Group:
    """One line a model, the dense one first; how it was measured stands below."""
    from rich.console import Group
    from rich.text import Text

    from spinecli.evaluation.sweep.report import columns, conditions

    lines = [_line(row, results) for row in results.rows]
    return Group(table("", columns(results), lines), Text("\n".join(conditions(results)), style="dim"))


def _line(row: SweepRow, results: SweepResults) -> list[str]:
    dense = results.dense
    cells = [row.name, f"{row.achieved_sparsity:.1%}", number(row.parameters)]
    cells += [_ratio(row.parameters, dense.parameters), _ratio(row.flops_per_token, dense.flops_per_token)]
    cells.append(f"{row.held_out:.4f}")
    for text, value in row.perplexity.items():
        cells += [f"{value:.4g}", _ratio(value, dense.perplexity[text])]
    if row.speed:
        cells.append(f"{row.speed.decode_ratio:.3f}")
    return cells


def _ratio(value: float, dense: float) -> str:
    return f"{value / dense:.3f}" if dense else "-"
