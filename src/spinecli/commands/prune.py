"""`spine prune`: cut blocks and neurons out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands import options
from spinecli.commands.prune_view import rendered
from spinecli.console import Terminal


def prune(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory, a hub id, or builtin:tiny.")],
    sparsity: Annotated[
        float, typer.Option("--sparsity", help="Share of the block parameters to remove, between 0 and 1.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write; appears whole or not at all.")] = None,
    method: Annotated[
        str, typer.Option("--method", help="spine, comp, magnitude, random, wanda-sp, flap or shortgpt.")
    ] = "spine",
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric", help="Reading of COMP's neuron metric: m0, m1, m2, m3 or m4. Default: m4.", show_default=False
        ),
    ] = None,
    block_share: Annotated[
        str,
        typer.Option(
            "--block-share",
            help="Share of the budget spent on whole blocks, 0 to 1; auto compares on calibration rows.",
        ),
    ] = "auto",
    protect: Annotated[
        str | None,
        typer.Option(
            "--protect",
            help="Blocks that stay, e.g. 0,1,-1, or none. Default: the first eighth and the last sixteenth.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        str,
        typer.Option(
            "--heads", help="auto: heads leave if plain transformers can carry fewer; cut: always; keep: never."
        ),
    ] = "auto",
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            help="uniform: all blocks alike, a plain checkpoint; adaptive: each as wide as it needs to be, with "
            "--method spine. Default: uniform, unless the model's blocks differ already.",
            show_default=False,
        ),
    ] = None,
    round_to: Annotated[
        int, typer.Option("--round-to", help="Kept channels are a multiple of this; 32 or 256 for quantised GGUF.")
    ] = 8,
    calibration: options.Calibration = None,
    calibration_rows: options.CalibrationRows = 128,
    calibration_length: options.CalibrationLength = 128,
    special_tokens: options.SpecialTokens = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.ComputeDtype = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Cut whole blocks and then heads and channels out of MODEL, without gradients, one block in memory at a time."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug, resumable=None if dry_run else out)
    with terminal.reporting_errors():
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.checkpoints.cutting import Heads
        from spinecli.checkpoints.stream.block_stream import compute_options
        from spinecli.choice import choice
        from spinecli.data.rows import CalibrationOptions, SpecialTokens
        from spinecli.errors import OptionError
        from spinecli.pruning.decision import decide
        from spinecli.pruning.request import PruneConfig, Widths, open_request
        from spinecli.pruning.run import prune as run_prune

        if out is None and not dry_run:
            raise OptionError("Name the directory to write with --out, or add --dry-run to write nothing.")
        stopwatch = Stopwatch()
        if out is not None and not resume:
            check_output(OutputOptions(out, overwrite, resume))
        request = open_request(
            PruneConfig(
                model=model,
                sparsity=sparsity,
                method=method,
                metric=metric,
                block_share=_block_share(block_share),
                protect=_protect(protect),
                heads=choice("--heads", Heads, heads),
                widths=None if widths is None else choice("--widths", Widths, widths),
                round_to=round_to,
                calibration=CalibrationOptions(
                    calibration,
                    calibration_rows,
                    calibration_length,
                    choice("--special-tokens", SpecialTokens, special_tokens),
                ),
                seed=seed,
                compute=compute_options(device, dtype.value),
            )
        )
        tokens = request.calibration
        terminal.note(
            f"calibrating on {tokens.rows} rows of {tokens.length} tokens, {tokens.frame}: {tokens.text.description}"
        )
        with terminal.progress() as progress:
            if dry_run or out is None:
                decision = decide(request, stopwatch=stopwatch, progress=progress)
                report: dict[str, Any] = decision.report()
                report["memory_bytes"] = decision.plan.memory_bytes
            else:
                manifest = run_prune(request, OutputOptions(out, overwrite, resume), stopwatch, progress)
                report = manifest.model_dump(mode="json")["report"]
        measured = stopwatch.measured()
        value = {"out": None if dry_run else str(out), **report, "measured": measured.model_dump(mode="json")}
        terminal.result(value, *rendered(report, None if dry_run else out, measured.peak_memory_bytes))


def _block_share(text: str) -> float | None:
    from spinecli.errors import OptionError

    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"--block-share must be auto or a number between 0 and 1, not {text!r}.") from None


def _protect(text: str | None) -> tuple[int, ...] | None:
    from spinecli.errors import OptionError

    if text is None:
        return None
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--protect takes block numbers separated by commas, or none, not {text!r}.") from None
