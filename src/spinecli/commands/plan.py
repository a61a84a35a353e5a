"""`spine plan`: how deep LoRA reaches on each device of a fleet, and with which ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands.flags import OUTPUT, DryRun, OutUnlessDry, Overwrite, from_config
from spinecli.console import Terminal, size, table
from spinecli.federation.planning.config import PlanConfig

Plot = Annotated[bool, typer.Option("--plot", help="Draw plan.png into the output.", rich_help_panel=OUTPUT)]


@from_config(PlanConfig)
def plan(
    config: PlanConfig,
    terminal: Terminal,
    out: OutUnlessDry = None,
    plot: Plot = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Choose for every device of a fleet in how many of MODEL's last blocks it trains LoRA, and with which ranks."""
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.artifacts.picture_file import require_matplotlib
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.errors import OptionError
    from spinecli.federation.planning.request import open_request
    from spinecli.federation.planning.run import decide
    from spinecli.federation.planning.run import plan as write_plan

    if plot and dry_run:
        raise OptionError("--plot draws into the output, which --dry-run does not write; drop one of them.")
    if plot:
        require_matplotlib()
    stopwatch = Stopwatch()
    output = None if out is None or dry_run else OutputOptions(out, overwrite)
    if output is not None:
        check_output(output)
    decision = decide(open_request(config), stopwatch)
    report: dict[str, Any] = decision.report()
    if output is not None:
        write_plan(decision, output, stopwatch, picture=plot)
    measured = stopwatch.measured().model_dump(mode="json")
    value = {"out": None if dry_run else str(out), **report, "measured": measured}
    terminal.result(value, *_rendered(report, None if dry_run else out))


def _rendered(report: dict[str, Any], out: Path | None) -> list[Any]:
    blocks = len(report["rank_distribution"])
    uniform_columns = ("uniform\nround", "uniform\nidle", "uniform\nmemory")
    columns = ("class", "devices", "depth", "ranks", "round", "idle", "memory", *uniform_columns)
    rows = [_row(found["name"], found["plan"], found["uniform"]) for found in report["classes"]]
    if len(rows) > 1:
        rows.append(_row("all", report["plan"], report["uniform"]))
    uniform_rank = sum(report["asked_ranks"]) / blocks
    note = (
        f"Depth is how many of the {blocks} blocks a device trains, counted from the output. Idle is the mean share of "
        f"the fleet's round that a device waits. Uniform is rank {uniform_rank:g} in all blocks."
    )
    configurations = [
        (
            found["name"],
            str(found["devices"]),
            f"{blocks - found['depth']}..{blocks - 1}" if found["depth"] > 1 else str(blocks - 1),
            _span((found["ranks"][0], found["ranks"][-1])),
            size(found["message_bytes"]),
        )
        for found in report["configurations"]
    ]
    names = ("configuration", "devices", "blocks, from 0", "ranks", "one message")
    return [
        table("The plan, and the uniform plan it replaces", columns, rows, note=note),
        "",
        table("Configurations", names, configurations),
        "",
        *_warnings(report),
        _gain(report["plan"], report["uniform"], blocks),
        "nothing was written" if out is None else str(out),
    ]


def _row(name: str, found: dict[str, Any], uniform: dict[str, Any]) -> tuple[str, ...]:
    count = str(found["devices"])
    if found["taking_part"] < found["devices"]:
        count = f"{found['taking_part']} of {found['devices']}"
    planned = (_span(found["depths"]), _span(found["ranks"])) if found["taking_part"] else ("-", "-")
    return (name, count, *planned, *_costs(found), *_costs(uniform))


def _costs(found: dict[str, Any]) -> tuple[str, str, str]:
    if not found["taking_part"]:
        return ("-", "-", "-")
    return f"{found['seconds']:.1f} s", f"{found['waiting']:.0%}", f"{found['memory_bytes'] / 1e9:.2f} GB"


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}..{ends[1]}"


def _warnings(report: dict[str, Any]) -> list[str]:
    """What the plan could not keep, a sentence each."""
    goals, found = report["goals"], report["plan"]
    lines = []
    if left := found["devices"] - found["taking_part"]:
        lines.append(f"{left} devices take no part: their memory does not hold the least depth.")
    if not goals["meets_waiting"]:
        lines.append(f"No depths keep the waiting below {goals['max_waiting']:.0%} of a round; these keep it least.")
    if not goals["meets_traffic"]:
        lines.append(
            f"No plan keeps the traffic of a round below {size(goals['traffic_budget_bytes'])}; this one sends least."
        )
    if report["rank_distribution"] != report["asked_ranks"]:
        lowered = report["asked_ranks"][-1] - report["rank_distribution"][-1]
        lines.append(f"Ranks are lowered by up to {lowered} to save traffic.")
    return lines


def _gain(found: dict[str, Any], uniform: dict[str, Any], blocks: int) -> str:
    """One sentence: what the plan gains over the uniform one, and what it gives for that."""
    if not uniform["taking_part"]:
        return (
            f"A round takes {found['seconds']:.2f} s; the uniform plan cannot be run, because no device has the memory "
            "for it."
        )
    ratio = uniform["seconds"] / found["seconds"]
    pace = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    saved = 1 - found["traffic_bytes"] / uniform["traffic_bytes"]
    joined = ""
    if found["taking_part"] != uniform["taking_part"]:
        joined = f" with {found['taking_part']} devices instead of {uniform['taking_part']}"
    return (
        f"A round takes {found['seconds']:.2f} s instead of {uniform['seconds']:.2f} s ({pace}){joined}, devices wait "
        f"{found['waiting']:.0%} of it instead of {uniform['waiting']:.0%}, and all together send and receive "
        f"{size(found['traffic_bytes'])} instead of {size(uniform['traffic_bytes'])} ({-saved:+.0%}); a device trains "
        f"{found['mean_depth']:.1f} of {blocks} blocks on average."
    )
