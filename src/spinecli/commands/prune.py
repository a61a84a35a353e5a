"""`spine prune`: cut blocks and neurons out of a checkpoint."""

from __future__ import annotations

from typing import Any

from spinecli.commands.flags import DryRun, OutUnlessDry, Overwrite, Resume, from_config
from spinecli.commands.prune_view import rendered
from spinecli.console import Terminal
from spinecli.pruning.config import PruneConfig


@from_config(PruneConfig)
def prune(
    config: PruneConfig,
    terminal: Terminal,
    out: OutUnlessDry = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Cut whole blocks and then heads and channels out of MODEL, without gradients, one block in memory at a time."""
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.pruning.decision import decide
    from spinecli.pruning.request import open_request
    from spinecli.pruning.run import prune as run_prune

    stopwatch = Stopwatch()
    if out is not None and not resume:
        check_output(OutputOptions(out, overwrite, resume))
    request = open_request(config)
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
