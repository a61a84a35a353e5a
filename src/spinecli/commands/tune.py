"""`spine tune`: recover a pruned checkpoint without training it."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands import options
from spinecli.console import Terminal, table


def tune(
    pruned: Annotated[Path, typer.Argument(help="Directory that spine prune wrote.")],
    out: options.Out,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="mask, mask+bias, lsq, or auto: per layer whichever holds best on held-out rows."
        ),
    ] = "auto",
    dense: Annotated[
        str | None,
        typer.Option("--dense", help="The dense checkpoint, if it has moved since.", show_default=False),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="Text to calibrate on. Default: that of the prune run.", show_default=False),
    ] = None,
    calibration_rows: Annotated[
        int | None,
        typer.Option("--calibration-rows", help="Default: that of the prune run.", min=2, show_default=False),
    ] = None,
    calibration_length: Annotated[
        int | None,
        typer.Option("--calibration-length", help="Default: that of the prune run.", min=2, show_default=False),
    ] = None,
    special_tokens: Annotated[
        str | None,
        typer.Option(
            "--special-tokens", help="auto or none, see spine prune. Default: as the prune run.", show_default=False
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.ComputeDtype = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Recover what pruning lost by closed-form tuning against the dense model; no training, no run-time cost."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug, resumable=out)
    with terminal.reporting_errors():
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.checkpoints.stream.block_stream import compute_options
        from spinecli.choice import choice
        from spinecli.data.rows import SpecialTokens
        from spinecli.pruning.recovery.least_squares import TuneMethod
        from spinecli.pruning.recovery.recover import held_out_rows
        from spinecli.pruning.recovery.tune import TuneConfig, open_request
        from spinecli.pruning.recovery.tune import tune as run_tune

        stopwatch = Stopwatch()
        output = OutputOptions(out, overwrite, resume)
        if not resume:
            check_output(output)
        request = open_request(
            TuneConfig(
                pruned=pruned,
                dense=dense,
                method=choice("--method", TuneMethod, method),
                calibration_text=calibration,
                calibration_rows=calibration_rows,
                calibration_length=calibration_length,
                special_tokens=choice("--special-tokens", SpecialTokens, special_tokens) if special_tokens else None,
                seed=seed,
                compute=compute_options(device, dtype.value),
            )
        )
        tokens = request.calibration
        judging = held_out_rows(tokens.rows)
        terminal.note(
            f"tuning on {tokens.rows - judging} rows of {tokens.length} tokens, judging on {judging} others, "
            f"{tokens.frame}: {tokens.text.description}"
        )
        with terminal.progress() as progress:
            manifest = run_tune(request, output, stopwatch, progress)
        report = manifest.model_dump(mode="json")["report"]
        value = {"out": str(out), **report, "measured": manifest.measured.model_dump(mode="json")}
        terminal.result(value, *_rendered(report, out))


def _rendered(report: dict[str, Any], out: Path) -> list[Any]:
    rows = [
        (
            str(layer["block"]),
            str(layer["dense_block"]),
            layer["layer"],
            layer["choice"],
            f"{layer['error_before']:.4f}",
            f"{layer['error_after']:.4f}",
            f"{1 - layer['error_after'] / layer['error_before']:.0%}" if layer["error_before"] else "0%",
        )
        for layer in report["layers"]
    ]
    columns = ("block", "dense block", "layer", "answer", "error before", "after", "recovered")
    if "held_out_loss_before" in report:
        before, after = exp(report["held_out_loss_before"]), exp(report["held_out_loss_after"])
        verdict = f"held-out perplexity {before:.3f} before, {after:.3f} after tuning"
    else:
        before, after = report["held_out_distance_before"], report["held_out_distance_after"]
        verdict = f"{report['judged_by']} on held-out rows: {before:.4f} before, {after:.4f} after tuning"
    if report["kept"] == "untuned":
        verdict += "; the weights were left as they were"
    return [
        table("Relative error of each tuned layer on held-out rows", columns, rows, words=(0, 1, 2, 3)),
        "",
        verdict,
        str(out),
    ]
