"""`spine prune`: cut blocks and neurons out of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands.flags import OUTPUT, DryRun, OutUnlessDry, Overwrite, Resume, from_config
from spinecli.console import Terminal, duration, number, size, table
from spinecli.pruning.config import PruneConfig

Score = Annotated[
    bool,
    typer.Option(
        "--score", help="With --dry-run: also score and compare, and print the full plan.", rich_help_panel=OUTPUT
    ),
]


@from_config(PruneConfig)
def prune(
    config: PruneConfig,
    terminal: Terminal,
    out: OutUnlessDry = None,
    dry_run: DryRun = False,
    score: Score = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Remove whole blocks, then heads and channels, from MODEL, without gradients, one block in memory at a time."""
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.pruning.cost import foresee, run_memory
    from spinecli.pruning.decision import planned
    from spinecli.pruning.request import open_request
    from spinecli.pruning.run import dry_run as run_dry
    from spinecli.pruning.run import prune as run_prune

    stopwatch = Stopwatch()
    if out is not None and not resume:
        check_output(OutputOptions(out, overwrite, resume))
    request = open_request(config)
    rows = request.calibration
    terminal.note(f"calibrating on {rows.rows} rows of {rows.length} tokens, {rows.frame}: {rows.description}")
    with terminal.context(stopwatch) as context:
        if (dry_run or out is None) and not score:
            foreseen = foresee(request)
            terminal.result({"out": None, **foreseen}, *_foreseen(foreseen))
            return
        if dry_run or out is None:
            decision = run_dry(request, context)
            report: dict[str, Any] = planned(request, decision).report() | decision.report()
            report["memory_bytes"] = run_memory(request)
        else:
            manifest = run_prune(request, OutputOptions(out, overwrite, resume), context)
            report = manifest.model_dump(mode="json")["report"]
    measured = stopwatch.measured()
    value = {"out": None if dry_run else str(out), **report, "measured": measured.model_dump(mode="json")}
    terminal.result(value, *rendered(report, None if dry_run else out, measured.peak_memory_bytes))


def _foreseen(value: dict[str, Any]) -> list[Any]:
    """Tables and lines for the terminal, of what can be said without a look at any token."""
    rows = [
        (
            str(each["removed_blocks"]),
            str(each["shape"]["heads"]),
            str(each["shape"]["channels"]),
            f"{each['achieved_sparsity']:.2%}",
            number(each["cut"]["total_parameters"]),
            size(each["cut"]["bytes"]),
        )
        for each in value["possible"]
    ]
    columns = ("blocks removed", "heads", "channels", "sparsity", "all parameters", "size on disk")
    title = "Cuts to choose from, with the same widths in all blocks"
    return [
        *([table(title, columns, rows), ""] if rows else []),
        f"a run needs about {size(value['memory_bytes'])} of memory and {duration(value['predicted_seconds'])}, "
        f"{value['predicted_passes']:.1f} times a forward pass of the blocks over the calibration rows",
        "no text was looked at, and nothing was written; --dry-run --score scores and compares, too",
    ]


def rendered(report: dict[str, Any], out: Path | None, peak: int | None) -> list[Any]:
    """Tables and lines for the terminal, from a prune report.

    Args:
        out: what was written; None after a dry run.
        peak: of the process' memory, in bytes.
    """
    lines = [
        f"{report['achieved_sparsity']:.2%} of the block parameters removed"
        + (f"; without blocks {', '.join(map(str, removed))}, counted from 0" if (removed := _removed(report)) else ""),
        f"written as {report['model_type']}; "
        + "; ".join(f"{engine}: {verdict}" for engine, verdict in report["engines"].items()),
    ]
    counts = (f"{rows} rows of {kind}" for kind, rows in report["calibration"].items())
    lines.append(f"calibrated on {', '.join(counts)}")
    if last := report["kept_for_their_kind"]:
        kinds = ", ".join(f"block {index} ({kind})" for index, kind in last.items())
        lines.append(f"stays so that no kind of attention leaves the model: {kinds}")
    if refit := report.get("refit"):
        before, after = refit["held_out_before"], refit["held_out_after"]
        answer = "the re-fit" if refit["kept"] == "tuned" else "the bare cut"
        lines.append(
            f"{refit['judged_by']}, on held-out rows: {before:.4f} as cut, {after:.4f} re-fitted; {answer} is kept"
        )
    if out is None:
        lines.append(f"a run needs about {size(report['memory_bytes'])} of memory; nothing was written")
    else:
        lines.append(f"{out}" + (f", peak memory {size(peak)}" if peak else ""))
    drawn = [_sizes(report), "", _leaving(report)]
    if report["compared"]:
        drawn += ["", _compared(report["compared"])]
        lines.insert(0, f"allocations compared by the {report['compared_by']}, after a recovery")
    return [*drawn, "", *lines]


def _removed(report: dict[str, Any]) -> list[int]:
    removed: list[int] = report["removed_blocks"]
    return removed


def _sizes(report: dict[str, Any]) -> Any:
    before, after = report["dense"], report["cut"]
    old, new = report["shapes_before"], report["shapes_after"]
    widths = [
        (f"{label} a block", _span(shape[key] for shape in old), _span(shape[key] for shape in new))
        for label, key in (("heads", "heads"), ("KV heads", "kv_heads"), ("channels", "channels"))
    ]
    figures = [
        ("blocks", str(len(old)), str(len(new))),
        *widths,
        ("block parameters", number(before["block_parameters"]), number(after["block_parameters"])),
        ("all parameters", number(before["total_parameters"]), number(after["total_parameters"])),
        ("FLOPs a token", number(before["flops_per_token"]), number(after["flops_per_token"])),
        ("size on disk", size(before["bytes"]), size(after["bytes"])),
    ]
    return table("What is cut", ("", "dense", "cut"), figures)


def _leaving(report: dict[str, Any]) -> Any:
    units = [
        (
            str(block["block"]),
            _leaving_heads(block, shape, gone := block["block"] in _removed(report)),
            "all" if gone or (shape["channels"] and block["channels"] == shape["channels"]) else str(block["channels"]),
        )
        for block, shape in zip(report["removed_by_block"], report["shapes_before"], strict=True)
    ]
    return table("What leaves each block, counted from 0", ("block", "KV heads", "channels"), units, words=(0, 1))


def _leaving_heads(block: dict[str, Any], shape: dict[str, Any], gone: bool) -> str:
    groups = block["kv_heads"]
    if gone or (groups and len(groups) == shape["kv_heads"]):
        return "all"
    return ", ".join(map(str, groups)) or "none"


def _compared(compared: list[dict[str, Any]]) -> Any:
    best = min(judged["held_out"] for judged in compared)
    rows = [
        (
            judged["widths"],
            str(judged["removed_blocks"]),
            _span(shape["heads"] for shape in _kept(judged)),
            _span(shape["channels"] for shape in _kept(judged)),
            f"{judged['held_out']:.4f}" + (" *" if judged["held_out"] == best else "  "),
        )
        for judged in compared
    ]
    columns = ("widths", "blocks removed", "heads", "channels", "after recovery")
    return table("Allocations compared on held-out calibration rows", columns, rows)


def _kept(judged: dict[str, Any]) -> list[dict[str, Any]]:
    """Shapes of the blocks that stay."""
    shapes = judged.get("shapes") or [judged["shape"]]
    return [shape for shape in shapes if shape["heads"] or shape["channels"]]


def _span(values: Iterable[int]) -> str:
    """One number, or the smallest and the largest."""
    found = set(values)
    return str(min(found)) if len(found) == 1 else f"{min(found)} to {max(found)}"
