"""`spine heal`: a short distillation of a cut checkpoint from the dense one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spinecli.commands.flags import DryRun, OutUnlessDry, Overwrite, Resume, from_config
from spinecli.console import Terminal, duration, number, size, table
from spinecli.healing.config import HealConfig, Loss


@from_config(HealConfig)
def heal(
    config: HealConfig,
    terminal: Terminal,
    out: OutUnlessDry = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Train PRUNED for a short time to predict what the dense model predicts, and keep it only if that helps."""
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.healing.cost import foresee
    from spinecli.healing.processes import leads
    from spinecli.healing.request import open_request
    from spinecli.healing.run import heal as run_heal

    stopwatch = Stopwatch()
    if not leads():
        terminal = replace(terminal, quiet=True)
    if out is not None and not resume:
        check_output(OutputOptions(out, overwrite, resume))
    request = open_request(config)
    text = request.text
    terminal.note(
        f"training on {text.rows - request.held_out} rows of {text.length} tokens, judging on {request.held_out} "
        f"others, {text.frame}: {text.description}"
    )
    with terminal.context(stopwatch) as context:
        if dry_run or out is None:
            foreseen = foresee(request)
            terminal.result({"out": None, **foreseen}, *_foreseen(foreseen))
            return
        manifest = run_heal(request, OutputOptions(out, overwrite, resume), context)
    if not leads():
        return
    report = manifest.model_dump(mode="json")["report"]
    value = {"out": str(out), **report, "measured": manifest.measured.model_dump(mode="json")}
    terminal.result(value, *_rendered(report, out))


def _foreseen(value: dict[str, Any]) -> list[Any]:
    return [
        f"{number(value['tokens'])} tokens in {value['steps']} steps; {number(value['trained_parameters'])} parameters "
        "are trained",
        f"a run needs about {size(value['memory_bytes'])} of memory, {size(value['disk_bytes'])} on disk, and "
        f"{duration(value['predicted_seconds'])} besides what the writing of text may take",
        "nothing was written",
    ]


def _rendered(report: dict[str, Any], out: Path) -> list[Any]:
    from spinecli.healing.curve import LOWERED

    rows = [
        (
            str(judged["step"]),
            number(judged["tokens"]),
            f"{judged['training']:.4f}" if judged["step"] else "-",
            f"{judged['held_out']:.4f}",
            f"{judged['held_out_lm']:.4f}",
        )
        for judged in report["curve"]
    ]
    lowered = LOWERED[Loss(report["loss"])]
    columns = ("step", "tokens", "training", "held-out", "loss on the text")
    before, after = report["held_out_before"], report["held_out_after"]
    verdict = f"{lowered}, on held-out rows: {before:.4f} before, {after:.4f} after healing"
    if report["kept"] != "healed":
        verdict += "; nothing was better than the weights as they were, which are kept"
    return [
        table(f"{lowered} in training and on held-out rows, in nats", columns, rows, words=()),
        "",
        verdict,
        str(out),
    ]
