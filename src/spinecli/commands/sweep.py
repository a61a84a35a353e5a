"""`spine sweep`: prune a model in several ways and by several ratios, and draw what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands import options
from spinecli.console import Terminal, number, table

if TYPE_CHECKING:
    from rich.console import Group

    from spinecli.evaluation.sweep.results import SweepResults, SweepRow


def sweep(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory, a hub id, or builtin:tiny.")],
    sparsity: Annotated[str, typer.Option("--sparsity", help="Ratios: 0.1,0.2,0.3, or a range 0.1..0.5.")],
    out: options.Out,
    step: Annotated[
        float | None,
        typer.Option("--step", help="From one ratio of a range to the next. Default: 0.1.", show_default=False),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Methods of spine prune, separated by commas; spine:adaptive lets blocks differ in width.",
        ),
    ] = "spine",
    tune: Annotated[
        str,
        typer.Option(
            "--tune",
            help="none; auto: by spine tune, unless the method re-fits as it cuts; mask or lsq: every cut, by that.",
        ),
    ] = "auto",
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            "--perplexity",
            help="Text to measure perplexity on: a .txt, .jsonl or .csv file, hub data set, builtin:NAME; repeatable. "
            "Default: as spine eval.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens in a window. Default: 256.", min=2, show_default=False)
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", help="At most this many windows. Default: 40.", min=1, show_default=False)
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time prefill and decode, each point and MODEL in turns.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep every point's checkpoint under points/.")] = False,
    round_to: Annotated[
        int, typer.Option("--round-to", help="Kept channels are a multiple of this; 32 or 256 for quantised GGUF.")
    ] = 8,
    calibration: options.Calibration = None,
    calibration_rows: options.CalibrationRows = 128,
    calibration_length: options.CalibrationLength = 128,
    special_tokens: options.SpecialTokens = "auto",
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.ComputeDtype = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prune MODEL by several ratios and methods, scoring it once a method, and compare what is left.

    [bold]spine sweep MODEL --sparsity 0.1..0.5 --methods spine,comp --latency --out sweep/[/bold]
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug, resumable=out)
    with terminal.reporting_errors():
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.choice import choice
        from spinecli.data.config import CalibrationConfig, SpecialTokens
        from spinecli.evaluation.session import Listeners
        from spinecli.evaluation.sweep.points import AfterCut, parse_methods, parse_ratios
        from spinecli.evaluation.sweep.request import SweepConfig, open_request
        from spinecli.evaluation.sweep.run import sweep as run_sweep

        output, stopwatch = OutputOptions(out, overwrite, resume), Stopwatch()
        asked = SweepConfig(
            model=model,
            sparsities=parse_ratios(sparsity, step),
            methods=parse_methods(methods),
            tune=choice("--tune", AfterCut, tune),
            texts=tuple(perplexity or ()),
            window=window,
            rows=rows,
            latency=latency,
            keep=keep,
            round_to=round_to,
            calibration=CalibrationConfig(
                text=calibration,
                rows=calibration_rows,
                length=calibration_length,
                special_tokens=choice("--special-tokens", SpecialTokens, special_tokens),
            ),
            seed=seed,
            device=device,
            dtype=dtype.value,
        )
        if not resume:
            check_output(output)
        with terminal.progress() as progress:
            listeners = Listeners(progress, terminal.note, debug)
            request = open_request(asked, listeners, stopwatch)
            tokens = request.calibration
            terminal.note(
                f"{len(request.points)} points, calibrated on {tokens.rows} rows of {tokens.length} tokens, "
                f"{tokens.frame}: {tokens.text.description}"
            )
            manifest, results = run_sweep(request, output, stopwatch, listeners)
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
