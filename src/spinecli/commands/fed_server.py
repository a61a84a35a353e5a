"""`spine fed-server`: fine-tune over devices on machines of their own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands import fed_launch_options as federated
from spinecli.commands import options
from spinecli.commands.fed_launch_request import federated_options, split_choices
from spinecli.commands.fed_launch_view import live_rounds, result_view, split_opening
from spinecli.console import Terminal

if TYPE_CHECKING:
    from spinecli.federation.engine import Engine


def fed_server(
    model: Annotated[str, typer.Argument(help="Checkpoint, the same as the devices': a directory or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="Held-out data to measure on; training data stay on devices.")],
    out: options.Out,
    devices: Annotated[str, typer.Option("--devices", help="Names of the devices of this run, with commas between.")],
    listen: Annotated[str, typer.Option("--listen", help="Where to listen: HOST or HOST:PORT of this machine.")],
    identity: Annotated[
        Path | None,
        typer.Option("--identity", help="Directory of the server's certificate and key.", show_default=False),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Do without certificates, on 127.0.0.1 alone.")] = False,
    strategy: federated.Strategy = "fedspine-model",
    text_column: federated.TextColumn = None,
    pair_column: federated.PairColumn = None,
    label_column: federated.LabelColumn = None,
    task: federated.TaskChoice = None,
    max_length: federated.MaxLength = 128,
    rounds: federated.Rounds = 50,
    cohort: federated.Cohort = 10,
    deadline: federated.Deadline = None,
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
    evaluate_every: federated.EvaluateEvery = 1,
    evaluation_limit: federated.EvaluationLimit = 2000,
    target_accuracy: federated.TargetAccuracy = None,
    deploy: federated.Deploy = False,
    cut_layer: Annotated[
        str | None,
        typer.Option("--cut-layer", help="Blocks on the devices.", rich_help_panel=federated.SPLIT, show_default=False),
    ] = None,
    bottom: federated.BottomWay = None,
    top: federated.TopWay = None,
    feature_dtype: federated.FeatureDtypeChoice = None,
    ingress: federated.Ingress = None,
    largest_batch: federated.LargestBatch = None,
    divergence_limit: federated.DivergenceLimit = None,
    selection: federated.SelectionChoice = None,
    optimizer: federated.OptimizerChoice = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.ComputeDtype = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune MODEL over devices that join with `spine fed-device`; the run begins when all of them are ready."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug, resumable=out)
    with terminal.reporting_errors():
        from spinecli.remote.available import require_nvflare

        require_nvflare("spine fed-server")
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.evaluation.quiet import quiet_libraries
        from spinecli.federation.results import FederatedResult
        from spinecli.federation.run import launch
        from spinecli.federation.split.request import split_options, split_request
        from spinecli.federation.split.run import launch as launch_split
        from spinecli.federation.strategies import SPLITTING
        from spinecli.remote.address import parse_address, parse_names, require_protection
        from spinecli.remote.serve import open_server_request, serving

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
        address, names = parse_address(listen, "--listen"), parse_names(devices)
        require_protection(address, identity, insecure=insecure)
        stopwatch, output = Stopwatch(), OutputOptions(out, overwrite, resume)
        if not resume:
            check_output(output)
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
            request = open_server_request(replace(general, engine="nvflare", clock="wall"), names)
        for note in request.splits.notes:
            terminal.note(note)
        split = split_request(request, split_options(chosen, request.options)) if strategy in SPLITTING else None
        terminal.note(f"{strategy} over {', '.join(names)}; {len(request.evaluation)} examples held out")
        if split is not None:
            terminal.note(split_opening(split))

        def connect(state: Path) -> AbstractContextManager[Engine]:
            return serving(request, split, names, address, identity, state, terminal.note)

        with quiet_libraries(debug), live_rounds(terminal, rounds, "wall") as listener:
            if split is not None:
                manifest = launch_split(split, output, stopwatch, listener, connect)
            else:
                manifest = launch(request, output, stopwatch, listener, connect)
        result = FederatedResult.model_validate(manifest.report)
        measured = stopwatch.measured()
        value = {"out": str(out), **result.model_dump(mode="json"), "measured": measured.model_dump(mode="json")}
        terminal.result(value, *result_view(result, request, out, measured.seconds["total"]))
