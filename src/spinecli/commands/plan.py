"""`spine plan`: how deep LoRA reaches on each device of a fleet, and with which ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands import options
from spinecli.console import Terminal, size, table


def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory, a hub id, or builtin:tiny.")],
    fleet: Annotated[
        str, typer.Option("--fleet", help="A fleet's .toml file, or a built-in one: jetson-80, phones-40, uniform-10.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write; appears whole or not at all.")] = None,
    rank: Annotated[float, typer.Option("--rank", help="Mean rank over the blocks.")] = 8.0,
    rank_step: Annotated[
        int, typer.Option("--rank-step", help="Growth of the rank from one block to the next; 0 for equal ranks.")
    ] = 1,
    targets: Annotated[
        str, typer.Option("--targets", help="Adapted projections: all, attention, query-value, or names with commas.")
    ] = "all",
    labels: Annotated[
        int | None,
        typer.Option(
            "--labels",
            help="Classes of a trained classification head. Default: the checkpoint's own task.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of a training step.")] = 16,
    length: Annotated[int, typer.Option("--length", help="Tokens of a row.")] = 128,
    local_steps: Annotated[int, typer.Option("--local-steps", help="Training steps of a round.")] = 20,
    max_waiting: Annotated[
        float, typer.Option("--max-waiting", help="Share of a round that devices may wait on average, 0 to 1.")
    ] = 0.6,
    coverage: Annotated[
        float,
        typer.Option("--coverage", help="Share of the devices from which on one more adds nothing to a block, 0 to 1."),
    ] = 0.5,
    traffic_budget: Annotated[
        float | None,
        typer.Option(
            "--traffic-budget",
            help="Megabytes a round, up and down, of all devices together. Default: no limit.",
            show_default=False,
        ),
    ] = None,
    min_depth: Annotated[int, typer.Option("--min-depth", help="Blocks that every device trains at least.")] = 1,
    dtype: Annotated[
        options.Dtype, typer.Option("--dtype", help="Precision of the frozen weights in a device's memory.")
    ] = options.Dtype.float32,
    plot: Annotated[bool, typer.Option("--plot", help="Draw plan.png into the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Choose for every device of a FLEET in how many of MODEL's last blocks it trains LoRA, and with which ranks."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.artifacts.picture_file import require_matplotlib
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.errors import OptionError
        from spinecli.federation.planning.request import PlanConfig, open_request
        from spinecli.federation.planning.run import decide
        from spinecli.federation.planning.run import plan as write_plan

        if out is None and not dry_run:
            raise OptionError("Name the directory to write with --out, or add --dry-run to write nothing.")
        if plot and dry_run:
            raise OptionError("--plot draws into the output, which --dry-run does not write; leave one of them away.")
        if plot:
            require_matplotlib()
        stopwatch = Stopwatch()
        output = None if out is None or dry_run else OutputOptions(out, overwrite)
        if output is not None:
            check_output(output)
        request = open_request(
            PlanConfig(
                model=model,
                fleet=fleet,
                rank=rank,
                rank_step=rank_step,
                targets=targets,
                batch_size=batch_size,
                length=length,
                local_steps=local_steps,
                labels=labels,
                max_waiting=max_waiting,
                coverage=coverage,
                traffic_budget=traffic_budget,
                min_depth=min_depth,
                dtype=dtype.value,
                seed=seed,
            )
        )
        decision = decide(request, stopwatch)
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
