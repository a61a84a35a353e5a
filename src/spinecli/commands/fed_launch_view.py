"""How a federated run looks: the rounds as they happen, where the labels lie, what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table

from spinecli.console import Terminal, duration, size, table

if TYPE_CHECKING:
    from spinecli.artifacts.directory import OutputOptions
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.federation.config import FederateConfig
    from spinecli.federation.engine import Connect
    from spinecli.federation.history import RoundRecord
    from spinecli.federation.loop import Listener
    from spinecli.federation.memory import MemoryNeed
    from spinecli.federation.request import FederatedRequest
    from spinecli.federation.results import FederatedResult
    from spinecli.federation.simulation.partition import LabelTable
    from spinecli.federation.split.request import SplitRequest

_SHOWN_ROUNDS = 12
_COLUMNS = ("round", "time", "accuracy", "loss", "slowest", "idle", "traffic", "pruned", "lost")


def launched(
    request: FederatedRequest,
    output: OutputOptions,
    stopwatch: Stopwatch,
    terminal: Terminal,
    connect: Connect | None,
) -> None:
    """Run all rounds before a person's eyes, and say what came of them."""
    from spinecli.evaluation.quiet import quiet_libraries
    from spinecli.federation.launch import launch
    from spinecli.federation.results import FederatedResult

    with quiet_libraries(terminal.debug), live_rounds(terminal, request.config) as listener:
        manifest = launch(request, output, stopwatch, listener, connect)
    result = FederatedResult.model_validate(manifest.report)
    measured = stopwatch.measured()
    value = {"out": str(output.path), **result.model_dump(mode="json"), "measured": measured.model_dump(mode="json")}
    terminal.result(value, *result_view(result, request, output.path, measured.seconds["total"]))


@contextmanager
def live_rounds(terminal: Terminal, config: FederateConfig) -> Iterator[Listener]:
    """A listener that keeps a table of the last rounds on a terminal, and is silent where there is none."""
    from spinecli.artifacts.context import unheard

    if terminal.quiet or not terminal.err.is_terminal:
        yield unheard
        return
    records: list[RoundRecord] = []
    with Live(_rounds_table(records, config), console=terminal.err, transient=True, auto_refresh=False) as live:

        def show(record: RoundRecord) -> None:
            records.append(record)
            live.update(_rounds_table(records, config), refresh=True)

        yield show


def _rounds_table(records: Sequence[RoundRecord], config: FederateConfig) -> Table:
    rows = [_round_row(record) for record in records[-_SHOWN_ROUNDS:]]
    rounds = config.train.rounds
    done = f"round {records[-1].round + 1} of {rounds}" if records else f"the first of {rounds} rounds is under way"
    splitting = any(record.split is not None for record in records)
    columns = tuple("KL" if splitting and name == "pruned" else name for name in _COLUMNS)
    note = "Time and waiting are the fleet's, not this machine's." if config.clock == "fleet" else ""
    return table(done, columns, rows, words=(4,), note=note)


def _round_row(record: RoundRecord) -> tuple[str, ...]:
    found = record.evaluation
    lost = sum(device.lost is not None for device in record.devices)
    answered = [device.ratio for device in record.devices if device.lost is None]
    return (
        str(record.round + 1),
        duration(record.ended),
        f"{found.accuracy:.1%}" if found else "",
        f"{found.loss:.4f}" if found else "",
        record.slowest or "",
        f"{record.idle_share:.0%}",
        size(record.bytes),
        _last_column(record, answered),
        str(lost) if lost else "",
    )


def _last_column(record: RoundRecord, ratios: Sequence[float]) -> str:
    """How much is pruned, or in split training how far the merged labels are from the fleet's."""
    if record.split is not None:
        return f"{record.split.divergence:.3f}"
    return f"{sum(ratios) / len(ratios):.0%}" if ratios else ""


def opening(request: FederatedRequest) -> str:
    """One line on what is about to run."""
    config, splits = request.config, request.splits
    begun = f", rows begin with {''.join(request.opening)}" if request.opening else ""
    kind = f"{len(splits.train.labels)} labels" if request.labels is not None else f"language modelling{begun}"
    return (
        f"{config.strategy} on {request.fleet.name}: {len(request.fleet.devices)} devices, {config.train.cohort} a "
        f"round; {len(splits.train)} examples, {kind}, {config.data.partition}; {len(request.evaluation)} held out"
    )


def split_opening(request: SplitRequest) -> str:
    """One line on where the model is cut and what crosses the cut."""
    blocks, config = request.checkpoint.blocks, request.config.split
    if not request.strategy.split:
        return f"unsplit: every device trains the whole model ({config.bottom})"
    return (
        f"{request.cut} of {blocks} blocks on the devices ({config.bottom}), the rest on the server ({config.top}); "
        f"up to {request.row_budget:.0f} rows of features an iteration in {config.feature_dtype}"
    )


def label_view(labels: LabelTable) -> list[Any]:
    """Where the labels lie, a line for each class of devices."""
    columns = ("class", "devices", "examples", *labels.labels, "labels a device", "divergence")
    rows = [
        (
            row.device_class,
            str(row.devices),
            str(row.examples),
            *map(str, row.counts),
            f"{row.labels_per_device:.1f}",
            f"{row.divergence:.3f}",
        )
        for row in (*labels.rows, labels.fleet)
    ]
    note = "Divergence: mean Kullback-Leibler divergence of a device's labels from all labels, in nats."
    return [table("Examples by label", columns, rows, note=note)]


def memory_view(needs: Sequence[MemoryNeed], strategy: str, refused: str | None) -> list[Any]:
    """What the strategy asks of the devices' memory, a line for each class, and whether a run would begin."""
    columns = ("class", "devices", "limit", "least", "most", "for", "")
    rows = [
        (
            need.device_class,
            str(need.devices),
            size(need.limit_bytes),
            size(need.least_bytes),
            size(need.most_bytes),
            need.work,
            "" if need.fits else "too little" if refused else "sits out",
        )
        for need in needs
    ]
    note = "Of the uncut model, counted from shapes: the least that can be asked for, and the most that will be."
    told = ["nothing was trained"] if refused is None else [f"a run would be refused: {refused}"]
    return [table(f"Memory under {strategy}", columns, rows, words=(0, 5, 6), note=note), "", *told]


def need_values(needs: Sequence[MemoryNeed]) -> list[dict[str, Any]]:
    """The same for a program."""
    return [
        {
            "class": need.device_class,
            "devices": need.devices,
            "limit_bytes": need.limit_bytes,
            "least_bytes": need.least_bytes,
            "most_bytes": need.most_bytes,
            "work": need.work,
            "fits": need.fits,
        }
        for need in needs
    ]


def result_view(result: FederatedResult, request: FederatedRequest, out: Path, seconds: float) -> list[Any]:
    """What came of a run."""
    figures = [
        ("rounds", str(result.rounds)),
        ("accuracy", "" if result.accuracy is None else f"{result.accuracy:.1%}"),
        ("best accuracy", "" if result.best_accuracy is None else f"{result.best_accuracy:.1%}"),
        ("loss", "" if result.loss is None else f"{result.loss:.4f}"),
        ("time on the fleet" if request.config.clock == "fleet" else "time of the rounds", duration(result.seconds)),
        ("traffic", size(result.bytes)),
        ("idle share of a round", f"{result.idle_share:.0%}"),
    ]
    if result.target_accuracy is not None:
        reached = result.seconds_to_target is not None and result.bytes_to_target is not None
        figures += [
            (f"time to {result.target_accuracy:.1%}", duration(result.seconds_to_target or 0) if reached else "never"),
            (f"traffic to {result.target_accuracy:.1%}", size(result.bytes_to_target or 0) if reached else "never"),
        ]
    if result.divergence is not None:
        figures.append(("KL of merged labels", f"{result.divergence:.3f} nats"))
    pruned = [f"{group.group} {group.ratio:.1%}" for group in result.groups if group.ratio > 0]
    if pruned:
        figures.append(("block parameters removed", ", ".join(pruned)))
    lines = []
    if result.infeasible_rounds:
        lines.append(
            f"in {result.infeasible_rounds} of {result.rounds} rounds no cohort kept --divergence-limit; a larger "
            "--cohort or --ingress would help"
        )
    if result.lost:
        reasons: dict[str, int] = {}
        for each in result.lost.values():
            for reason, count in each.items():
                reasons[reason] = reasons.get(reason, 0) + count
        told = ", ".join(f"{count} times {reason}" for reason, count in sorted(reasons.items()))
        lines.append(f"answers lost: {told}, on {len(result.lost)} devices; history.jsonl says which and why")
    lines.append(f"{out}, {duration(seconds)} on this machine")
    return [table(f"{request.config.strategy} on {request.fleet.name}", ("", ""), figures), "", *lines]
