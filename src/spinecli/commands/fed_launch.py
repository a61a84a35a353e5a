"""`spine fed-launch`: fine-tune over a fleet of devices."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from spinecli.commands import options
from spinecli.commands.fed_launch_view import label_view, live_rounds, opening, result_view, split_opening
from spinecli.console import Terminal

_STRATEGIES = "fedspine, fedspine-model, fed-loraprune, legend, fedit, hetlora, flexlora, flora or ffa-lora"
_SPLITTING = "mergesfl, sfl-fm, sfl-br, splitfed or fedavg"
_SPLIT_PANEL = f"Split training ({_SPLITTING})"


class Schedule(str, Enum):
    """How the learning rate goes over the rounds."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Score(str, Enum):
    """How devices measure importance."""

    lora = "lora"
    salience = "salience"


class Way(str, Enum):
    """What is trained of one half of a split model."""

    lora = "lora"
    full = "full"


class FeatureDtype(str, Enum):
    """How features and their gradients travel."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class Optimizer(str, Enum):
    """How split training goes downhill."""

    adamw = "adamw"
    sgd = "sgd"


class Selection(str, Enum):
    """How MergeSFL looks for a cohort."""

    greedy = "greedy"
    genetic = "genetic"
    priority = "priority"
    random = "random"


class Task(str, Enum):
    """What is learned from the data."""

    classification = "classification"
    language = "language"


def fed_launch(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory, a hub id, or builtin:tiny.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Training data: a .tsv, .csv, .jsonl or .txt file, a directory, or a hub data set.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write; appears whole or not at all.")] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help=f"How to federate: {_STRATEGIES}; or split the model: {_SPLITTING}.")
    ] = "fedspine",
    fleet: Annotated[
        str, typer.Option("--fleet", help="A fleet file, or jetson-N, phones-N, uniform-N for N devices.")
    ] = "jetson-80",
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="A directory that spine plan wrote, for LEGEND to start from.", show_default=False),
    ] = None,
    partition: Annotated[
        str,
        typer.Option("--partition", help="How data is dealt out: iid, dirichlet:ALPHA, shards:LABELS or column:NAME."),
    ] = "iid",
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--evaluation",
            help="Held-out data. Default: found beside the training data, or a share of it.",
            show_default=False,
        ),
    ] = None,
    evaluation_share: Annotated[
        float, typer.Option("--evaluation-share", help="Share to hold out where there is no held-out data.")
    ] = 0.1,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="Column of the text. Default: by its name.", show_default=False),
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option("--pair-column", help="Column of a second text, if there is one.", show_default=False)
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", help="Column of the label. Default: by its name.", show_default=False),
    ] = None,
    task: Annotated[
        Task | None, typer.Option("--task", help="What to learn. Default: as the columns suggest.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="At most so many examples of each file.", min=1, show_default=False)
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Longest row in tokens.")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds to run.")] = 50,
    cohort: Annotated[int, typer.Option("--cohort", help="Devices that take part in a round.")] = 10,
    local_steps: Annotated[int, typer.Option("--local-steps", help="Training steps of a device in a round.")] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows in a training step.")] = 16,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            help="Learning rate. Default: 1e-3, or 2e-4 where the model is split.",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        Schedule, typer.Option("--schedule", help="How the learning rate goes over the rounds.")
    ] = Schedule.linear,
    clip_norm: Annotated[float, typer.Option("--clip-norm", help="Largest norm of a step's gradient.")] = 1.0,
    rank: Annotated[int, typer.Option("--rank", help="LoRA rank, or the mean rank of strategies that vary it.")] = 8,
    smallest_rank: Annotated[int, typer.Option("--smallest-rank", help="Lowest rank of strategies that vary it.")] = 4,
    largest_rank: Annotated[int, typer.Option("--largest-rank", help="Highest rank of strategies that vary it.")] = 16,
    lora_scale: Annotated[float, typer.Option("--lora-scale", help="LoRA's alpha / rank, at every rank.")] = 2.0,
    targets: Annotated[
        str, typer.Option("--targets", help="Projections with LoRA: all, attention, query-value, or names.")
    ] = "all",
    sparsity: Annotated[
        float, typer.Option("--sparsity", help="Share of the block parameters that pruning strategies remove, 0 to 1.")
    ] = 0.5,
    prune_interval: Annotated[int, typer.Option("--prune-interval", help="Local steps between two cuts.")] = 20,
    score: Annotated[
        Score | None,
        typer.Option("--score", help="How importance is measured. Default: the strategy's own.", show_default=False),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option("--deadline", help="Seconds after which missing answers are given up.", show_default=False),
    ] = None,
    evaluate_every: Annotated[int, typer.Option("--evaluate-every", help="Rounds between two evaluations.")] = 1,
    evaluation_limit: Annotated[
        int, typer.Option("--evaluation-limit", help="At most so many held-out examples.")
    ] = 2000,
    target_accuracy: Annotated[
        float | None,
        typer.Option("--target-accuracy", help="Stop as soon as an evaluation reaches it, 0 to 1.", show_default=False),
    ] = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Also write, for each class of devices, the checkpoint it would run.")
    ] = False,
    cut_layer: Annotated[
        str | None,
        typer.Option(
            "--cut-layer",
            help="Blocks on the devices, or auto: as fits their memory and links. Default: auto.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    bottom: Annotated[
        Way | None,
        typer.Option(
            "--bottom",
            help="Train LoRA or all weights on the devices. Default: lora.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        Way | None,
        typer.Option(
            "--top",
            help="Train LoRA or all weights on the server. Default: full.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    feature_dtype: Annotated[
        FeatureDtype | None,
        typer.Option(
            "--feature-dtype",
            help="How features travel. Default: fp32.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    ingress: Annotated[
        float | None,
        typer.Option(
            "--ingress",
            help="Megabytes of features that the server takes in an iteration. Default: those of --cohort devices with "
            "--batch-size rows each, in fp32.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    largest_batch: Annotated[
        int | None,
        typer.Option(
            "--largest-batch",
            help="Most rows of a device's batch. Default: 64.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    divergence_limit: Annotated[
        float | None,
        typer.Option(
            "--divergence-limit",
            help="How far, in nats, merged labels may be from the fleet's. Default: 0.05.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    selection: Annotated[
        Selection | None,
        typer.Option(
            "--selection",
            help="How the cohort is looked for. Default: greedy.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        Optimizer | None,
        typer.Option(
            "--optimizer",
            help="How both halves go downhill. Default: adamw.",
            rich_help_panel=_SPLIT_PANEL,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how the data lies on the devices and train nothing.")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.ComputeDtype = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune MODEL over a fleet of devices that keep their data: LoRA, pruned and planned for each device."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug, resumable=True)
    with terminal.reporting_errors():
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.calibration.stream import compute_options
        from spinecli.errors import OptionError
        from spinecli.evaluation.quiet import quiet_libraries
        from spinecli.federation.data.columns import DataOptions
        from spinecli.federation.request import FederatedOptions, open_request
        from spinecli.federation.results import FederatedResult
        from spinecli.federation.run import launch
        from spinecli.federation.strategies import SPLITTING
        from spinecli.federation.strategies.strategy import Tuning
        from spinecli.split.request import SPLIT_RATE, split_options, split_request
        from spinecli.split.run import launch as launch_split

        if out is None and not dry_run:
            raise OptionError("Name the directory to write with --out, or add --dry-run to train nothing.")
        given = {
            "--cut-layer": cut_layer,
            "--bottom": bottom and bottom.value,
            "--top": top and top.value,
            "--feature-dtype": feature_dtype and feature_dtype.value,
            "--ingress": ingress,
            "--largest-batch": largest_batch,
            "--divergence-limit": divergence_limit,
            "--selection": selection and selection.value,
            "--optimizer": optimizer and optimizer.value,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        if chosen and strategy not in SPLITTING:
            raise OptionError(f"{next(iter(chosen))} belongs to split training; {strategy} has no use for it.")
        stopwatch = Stopwatch()
        if out is not None and not resume:
            check_output(OutputOptions(out, overwrite, resume))
        rate = (
            (SPLIT_RATE if strategy in SPLITTING else Tuning.learning_rate) if learning_rate is None else learning_rate
        )
        tuning = Tuning(
            rank=rank,
            smallest_rank=smallest_rank,
            largest_rank=largest_rank,
            scale=lora_scale,
            rounds=rounds,
            local_steps=local_steps,
            batch_size=batch_size,
            length=max_length,
            learning_rate=rate,
            sparsity=sparsity,
            prune_interval=prune_interval,
            score=score.value if score else None,
        )
        with stopwatch("reading"), quiet_libraries(debug):
            request = open_request(
                FederatedOptions(
                    model=model,
                    data=data,
                    strategy=strategy,
                    fleet=fleet,
                    plan=plan,
                    partition=partition,
                    evaluation=evaluation,
                    evaluation_share=evaluation_share,
                    data_options=DataOptions(
                        text_column=text_column,
                        pair_column=pair_column,
                        label_column=label_column,
                        task=task.value if task else None,
                        limit=limit,
                    ),
                    max_length=max_length,
                    rounds=rounds,
                    cohort=cohort,
                    deadline=deadline,
                    tuning=tuning,
                    targets=targets,
                    schedule=schedule.value,
                    clip_norm=clip_norm,
                    evaluate_every=evaluate_every,
                    evaluation_limit=evaluation_limit,
                    target_accuracy=target_accuracy,
                    deploy=deploy,
                    seed=seed,
                    compute=compute_options(device, dtype.value),
                )
            )
        if dry_run or out is None:
            labels = request.label_table()
            terminal.result(asdict(labels), *label_view(labels))
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
        output = OutputOptions(out, overwrite, resume)
        if strategy in SPLITTING:
            split = split_request(request, split_options(chosen, request.options))
            terminal.note(split_opening(split))
        with quiet_libraries(debug), live_rounds(terminal, rounds) as listener:
            if strategy in SPLITTING:
                manifest = launch_split(split, output, stopwatch, listener)
            else:
                manifest = launch(request, output, stopwatch, listener)
        result = FederatedResult.model_validate(manifest.report)
        measured = stopwatch.measured()
        value = {"out": str(out), **result.model_dump(mode="json"), "measured": measured.model_dump(mode="json")}
        terminal.result(value, *result_view(result, request, out, measured.seconds["total"]))
