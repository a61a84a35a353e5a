"""`spine fed-launch`: fine-tune over a fleet of devices."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands.fed_launch_view import label_view, launched, memory_view, need_values, opening, split_opening
from spinecli.commands.flags import OUTPUT, OutUnlessDry, Overwrite, Resume, from_config
from spinecli.console import Terminal
from spinecli.federation.config import FederateConfig

if TYPE_CHECKING:
    from spinecli.federation.request import FederatedRequest

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show how labels are distributed and which memory is needed; train nothing.",
        rich_help_panel=OUTPUT,
    ),
]


@from_config(FederateConfig)
def fed_launch(
    config: FederateConfig,
    terminal: Terminal,
    out: OutUnlessDry = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Fine-tune MODEL over a fleet of devices that keep their data, planned and pruned for each, or split."""
    from spinecli.artifacts.directory import OutputOptions, check_output
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.evaluation.quiet import quiet_libraries
    from spinecli.federation.request import open_request
    from spinecli.federation.split.request import split_request
    from spinecli.remote.engines import require_engine, starting_devices

    require_engine(config.engine.name)
    stopwatch = Stopwatch()
    if out is not None and not resume:
        check_output(OutputOptions(out, overwrite, resume))
    with stopwatch("reading"), quiet_libraries(terminal.debug):
        request = open_request(config)
    for note in request.splits.notes:
        terminal.note(note)
    split = split_request(request) if config.splits else None
    asked = split or request
    if dry_run or out is None:
        _show_needs(asked, terminal)
        return
    terminal.note(opening(request))
    if config.plan is not None and config.strategy != "legend":
        terminal.note(f"{config.strategy} decides by itself and does not read {config.plan}; legend does")
    if shortened := request.train.shortened:
        share = "all" if shortened == len(request.splits.train) else f"{shortened}"
        terminal.note(
            f"{share} of the {len(request.splits.train)} examples are longer than --max-length "
            f"{config.data.max_length} tokens and were shortened"
        )
    if split is not None:
        terminal.note(split_opening(split))
    connect = starting_devices(asked, terminal.note)
    launched(asked, OutputOptions(out, overwrite, resume), stopwatch, terminal, connect)


def _show_needs(request: FederatedRequest, terminal: Terminal) -> None:
    """Where the labels lie and what memory the strategy asks for."""
    labels = request.label_table()
    needs = request.needs()
    refused = request.memory_objection(needs)
    value = {**asdict(labels), "memory": need_values(needs), "refused": refused}
    terminal.result(value, *label_view(labels), "", *memory_view(needs, request.config.strategy, refused))
