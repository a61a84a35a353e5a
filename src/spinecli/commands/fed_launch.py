"""`spine fed-launch`: fine-tune over a fleet of devices."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands import fed_launch_options as federated
from spinecli.commands import options
from spinecli.commands.fed_launch_request import federated_options, split_choices
from spinecli.commands.fed_launch_view import (
    label_view,
    live_rounds,
    memory_view,
    need_values,
    opening,
    result_view,
    split_opening,
)
from spinecli.console import Terminal

if TYPE_CHECKING:
    from spinecli.federation.engine import Clock, Connect, Engine
    from spinecli.federation.request import FederatedRequest
    from spinecli.federation.split.request import SplitRequest


def fed_launch(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory, a hub id, or builtin:tiny.")],
    data: federated.Data,
    out: federated.Out = None,
    strategy: federated.Strategy = "fedspine-model",
    fleet: federated.Fleet = "jetson-80",
    devices: federated.Devices = None,
    engine: federated.Engine = federated.EngineName.local,
    clock: federated.Clock = None,
    plan: federated.Plan = None,
    partition: federated.Partition = "iid",
    evaluation: federated.Evaluation = None,
    evaluation_share: federated.EvaluationShare = 0.1,
    text_column: federated.TextColumn = None,
    pair_column: federated.PairColumn = None,
    label_column: federated.LabelColumn = None,
    task: federated.TaskChoice = None,
    limit: federated.Limit = None,
    max_length: federated.MaxLength = 128,
    rounds: federated.Rounds = 50,
    cohort: federated.Cohort = 10,
    local_steps: federated.LocalSteps = 20,
    batch_size: federated.BatchSize = 16,
    learning_rate: federated.LearningRate = None,
    schedule: federated.ScheduleChoice = federated.Schedule.linear,
    clip_norm: federated.ClipNorm = 1.0,
    weighting: federated.WeightingChoice = federated.Weighting.examples,
    rank: federated.Rank = 8,
    smallest_rank: federated.SmallestRank = 4,
    largest_rank: federated.LargestRank = 16,
    lora_scale: federated.LoraScale = 2.0,
    targets: federated.Targets = "all",
    sparsity: federated.Sparsity = 0.5,
    prune_interval: federated.PruneInterval = 20,
    score: federated.ScoreChoice = None,
    deadline: federated.Deadline = None,
    evaluate_every: federated.EvaluateEvery = 1,
    evaluation_limit: federated.EvaluationLimit = 2000,
    target_accuracy: federated.TargetAccuracy = None,
    deploy: federated.Deploy = False,
    cut_layer: federated.CutLayer = None,
    bottom: federated.BottomWay = None,
    top: federated.TopWay = None,
    feature_dtype: federated.FeatureDtypeChoice = None,
    ingress: federated.Ingress = None,
    largest_batch: federated.LargestBatch = None,
    divergence_limit: federated.DivergenceLimit = None,
    selection: federated.SelectionChoice = None,
    optimizer: federated.OptimizerChoice = None,
    dry_run: federated.DryRun = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.ComputeDtype = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune MODEL over a fleet of devices that keep their texts: pruned and planned for each, or split."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug, resumable=None if dry_run else out)
    with terminal.reporting_errors():
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.errors import OptionError
        from spinecli.evaluation.quiet import quiet_libraries
        from spinecli.federation.request import open_request
        from spinecli.federation.results import FederatedResult
        from spinecli.federation.run import launch
        from spinecli.federation.setup import memory_needs, memory_objection
        from spinecli.federation.split.request import split_options, split_request
        from spinecli.federation.split.run import launch as launch_split
        from spinecli.federation.strategies import SPLITTING
        from spinecli.remote.available import require_flower, require_nvflare

        if out is None and not dry_run:
            raise OptionError("Name the directory to write with --out, or add --dry-run to train nothing.")
        chosen = split_choices(
            strategy,
            cut_layer=cut_layer,
            bottom=bottom,
            top=top,
            feature_dtype=feature_dtype,
            ingress=ingress,
            largest_batch=largest_batch,
            divergence_limit=divergence_limit,
            selection=selection,
            optimizer=optimizer,
            deploy=deploy,
        )
        if engine is federated.EngineName.nvflare:
            require_nvflare("--engine nvflare")
        elif engine is federated.EngineName.flower:
            if strategy in SPLITTING:
                raise OptionError(
                    f"--engine flower does not run {strategy}: Flower starts a process on the device for every "
                    "message, which takes seconds, and split training exchanges messages at every step; take "
                    "--engine nvflare or local."
                )
            require_flower("--engine flower")
        elif clock is federated.ClockName.wall:
            raise OptionError(
                "--clock wall needs devices that take their own time; add --engine nvflare or flower, or drop it."
            )
        stopwatch = Stopwatch()
        if out is not None and not resume:
            check_output(OutputOptions(out, overwrite, resume))
        general = federated_options(
            model=model,
            data=data,
            strategy=strategy,
            text_column=text_column,
            pair_column=pair_column,
            label_column=label_column,
            task=task,
            max_length=max_length,
            rounds=rounds,
            cohort=cohort,
            deadline=deadline,
            local_steps=local_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule=schedule,
            clip_norm=clip_norm,
            weighting=weighting,
            rank=rank,
            smallest_rank=smallest_rank,
            largest_rank=largest_rank,
            lora_scale=lora_scale,
            targets=targets,
            sparsity=sparsity,
            prune_interval=prune_interval,
            score=score,
            evaluate_every=evaluate_every,
            evaluation_limit=evaluation_limit,
            target_accuracy=target_accuracy,
            deploy=deploy,
            seed=seed,
            device=device,
            dtype=dtype.value,
        )
        with stopwatch("reading"), quiet_libraries(debug):
            request = open_request(
                replace(
                    general,
                    fleet=fleet,
                    devices=devices,
                    engine=engine.value,
                    clock=clock.value if clock else _usual_clock(engine),
                    plan=plan,
                    partition=partition,
                    evaluation=evaluation,
                    evaluation_share=evaluation_share,
                    data_options=replace(general.data_options, limit=limit),
                )
            )
        for note in request.splits.notes:
            terminal.note(note)
        split = split_request(request, split_options(chosen, request.options)) if strategy in SPLITTING else None
        if dry_run or out is None:
            labels = request.label_table()
            needs = memory_needs(request) if split is None else split.needs()
            refused = memory_objection(request, needs) if split is None else split.memory_objection(needs)
            value = {**asdict(labels), "memory": need_values(needs), "refused": refused}
            terminal.result(value, *label_view(labels), "", *memory_view(needs, strategy, refused))
            return
        terminal.note(opening(request))
        if plan is not None and strategy != "legend":
            terminal.note(f"{strategy} decides by itself and does not read {plan}; legend does")
        if shortened := request.train.shortened:
            share = "all" if shortened == len(request.splits.train) else f"{shortened}"
            terminal.note(
                f"{share} of the {len(request.splits.train)} examples are longer than --max-length {max_length} tokens "
                "and were shortened"
            )
        if split is not None:
            terminal.note(split_opening(split))
        output = OutputOptions(out, overwrite, resume)
        connect = None if engine is federated.EngineName.local else _launcher(request, split, terminal)
        with quiet_libraries(debug), live_rounds(terminal, rounds, request.options.clock) as listener:
            if split is not None:
                manifest = launch_split(split, output, stopwatch, listener, connect)
            else:
                manifest = launch(request, output, stopwatch, listener, connect)
        result = FederatedResult.model_validate(manifest.report)
        measured = stopwatch.measured()
        value = {"out": str(out), **result.model_dump(mode="json"), "measured": measured.model_dump(mode="json")}
        terminal.result(value, *result_view(result, request, out, measured.seconds["total"]))


def _usual_clock(engine: federated.EngineName) -> Clock:
    return "fleet" if engine is federated.EngineName.local else "wall"


def _launcher(request: FederatedRequest, split: SplitRequest | None, terminal: Terminal) -> Connect:
    """Starts a process for each device when the run begins."""
    from spinecli.remote.client_dir import require_few

    require_few(request)

    def connect(state: Path) -> AbstractContextManager[Engine]:
        if request.options.engine == federated.EngineName.flower:
            from spinecli.remote import launch_flower

            return launch_flower.on_this_machine(request, state, terminal.note)
        from spinecli.remote import launch

        return launch.on_this_machine(request, split, state, terminal.note)

    return connect
