"""`spine tune`: recover a pruned checkpoint without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spinecli.commands.flags import Out, Overwrite, Resume, from_config
from spinecli.console import Terminal, table
from spinecli.pruning.config import TuneConfig


@from_config(TuneConfig)
def tune(
    config: TuneConfig, terminal: Terminal, out: Out, overwrite: Overwrite = False, resume: Resume = False
) -> None:
    """Recover what pruning lost in closed form against the dense model, without training and at no run-time cost."""
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.pruning.recovery.recover import held_out_rows
    from spinecli.pruning.recovery.tune import open_request
    from spinecli.pruning.recovery.tune import tune as run_tune

    stopwatch, output = Stopwatch(), OutputOptions(out, overwrite, resume)
    if not resume:
        check_output(output)
    request = open_request(config)
    tokens = request.calibration
    judging = held_out_rows(tokens.rows)
    terminal.note(
        f"tuning on {tokens.rows - judging} rows of {tokens.length} tokens, judging on {judging} others, "
        f"{tokens.frame}: {tokens.description}"
    )
    with terminal.context(stopwatch) as context:
        manifest = run_tune(request, output, context)
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
    columns = ("block", "dense\nblock", "layer", "answer", "error\nbefore", "after", "recovered")
    before, after = report["held_out_before"], report["held_out_after"]
    verdict = f"{report['judged_by']}, on held-out rows: {before:.4f} before, {after:.4f} after tuning"
    if report["kept"] == "untuned":
        verdict += "; the weights were left as they were"
    return [
        table("Relative error of each tuned layer on held-out rows", columns, rows, words=(0, 1, 2, 3)),
        "",
        verdict,
        str(out),
    ]
