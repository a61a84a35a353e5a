"""The options of `spine fed-launch` and `spine fed-server`, in the panels of their help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

_STRATEGIES = "fedspine, fedspine-model, fed-loraprune, legend, fedit, hetlora, flexlora, flora or ffa-lora"
_SPLITTING = "mergesfl, sfl-fm, sfl-br, splitfed or fedavg"
_DATA = "Data"
_TRAINING = "Rounds and training"
_LORA = "LoRA"
_PRUNING = "Pruning (fedspine, fedspine-model, fed-loraprune)"
_ENGINE = "Devices and engine"
SPLIT = f"Split training ({_SPLITTING})"


class Schedule(str, Enum):
    """How the learning rate goes over the rounds."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Weighting(str, Enum):
    """What a device's answer counts by in a mean."""

    examples = "examples"
    equal = "equal"


class Score(str, Enum):
    """How devices measure importance."""

    lora = "lora"
    salience = "salience"


class EngineName(str, Enum):
    """What carries messages to devices."""

    local = "local"
    nvflare = "nvflare"
    flower = "flower"


class ClockName(str, Enum):
    """Whose seconds count."""

    fleet = "fleet"
    wall = "wall"


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
    """Optimizers of split training."""

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


Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Training data: a .csv, .jsonl, .parquet or .txt file, a directory, or a hub data set.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Directory to write; appears whole or not at all.")]
Strategy = Annotated[
    str, typer.Option("--strategy", help=f"How to federate: {_STRATEGIES}; or split the model: {_SPLITTING}.")
]
Fleet = Annotated[str, typer.Option("--fleet", help="A fleet file, or jetson-N, phones-N, uniform-N for N devices.")]
Plan = Annotated[
    Path | None,
    typer.Option("--plan", help="A directory that spine plan wrote, for LEGEND to start from.", show_default=False),
]
Partition = Annotated[
    str,
    typer.Option(
        "--partition",
        help="How data is dealt out: iid, dirichlet:ALPHA, shards:LABELS or column:NAME.",
        rich_help_panel=_DATA,
    ),
]
Evaluation = Annotated[
    str | None,
    typer.Option(
        "--evaluation",
        help="Held-out data. Default: found beside the training data, or a share of it.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
EvaluationShare = Annotated[
    float,
    typer.Option(
        "--evaluation-share", help="Share to hold out where there is no held-out data.", rich_help_panel=_DATA
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column", help="Column of the text. Default: by its name.", show_default=False, rich_help_panel=_DATA
    ),
]
PairColumn = Annotated[
    str | None,
    typer.Option(
        "--pair-column", help="Column of a second text, if there is one.", show_default=False, rich_help_panel=_DATA
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label-column", help="Column of the label. Default: by its name.", show_default=False, rich_help_panel=_DATA
    ),
]
TaskChoice = Annotated[
    Task | None,
    typer.Option(
        "--task", help="What to learn. Default: as the columns suggest.", show_default=False, rich_help_panel=_DATA
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", help="At most so many examples of each file.", min=1, show_default=False, rich_help_panel=_DATA
    ),
]
MaxLength = Annotated[int, typer.Option("--max-length", help="Longest row in tokens.", rich_help_panel=_DATA)]
Rounds = Annotated[int, typer.Option("--rounds", help="Rounds to run.", rich_help_panel=_TRAINING)]
Cohort = Annotated[int, typer.Option("--cohort", help="Devices that take part in a round.", rich_help_panel=_TRAINING)]
LocalSteps = Annotated[
    int, typer.Option("--local-steps", help="Training steps of a device in a round.", rich_help_panel=_TRAINING)
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Rows in a training step.", rich_help_panel=_TRAINING)]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        help="Learning rate. Default: 1e-3, or 2e-4 where the model is split.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
ScheduleChoice = Annotated[
    Schedule, typer.Option("--schedule", help="How the learning rate goes over the rounds.", rich_help_panel=_TRAINING)
]
ClipNorm = Annotated[
    float, typer.Option("--clip-norm", help="Largest norm of a step's gradient.", rich_help_panel=_TRAINING)
]
WeightingChoice = Annotated[
    Weighting,
    typer.Option(
        "--weighting", help="Whether a device counts by its examples, or all alike.", rich_help_panel=_TRAINING
    ),
]
Rank = Annotated[
    int,
    typer.Option(
        "--rank",
        help="LoRA rank where a strategy has one for all; the mean rank of legend without a plan.",
        rich_help_panel=_LORA,
    ),
]
SmallestRank = Annotated[
    int, typer.Option("--smallest-rank", help="Lowest rank of strategies that vary it.", rich_help_panel=_LORA)
]
LargestRank = Annotated[
    int, typer.Option("--largest-rank", help="Highest rank of strategies that vary it.", rich_help_panel=_LORA)
]
LoraScale = Annotated[
    float, typer.Option("--lora-scale", help="LoRA's alpha / rank, at every rank.", rich_help_panel=_LORA)
]
Targets = Annotated[
    str,
    typer.Option(
        "--targets", help="Projections with LoRA: all, attention, query-value, or names.", rich_help_panel=_LORA
    ),
]
Sparsity = Annotated[
    float,
    typer.Option(
        "--sparsity",
        help="Share of the block parameters that pruning strategies remove, 0 to 1.",
        rich_help_panel=_PRUNING,
    ),
]
PruneInterval = Annotated[
    int, typer.Option("--prune-interval", help="Local steps between two cuts.", rich_help_panel=_PRUNING)
]
ScoreChoice = Annotated[
    Score | None,
    typer.Option(
        "--score",
        help="How importance is measured. Default: the strategy's own.",
        show_default=False,
        rich_help_panel=_PRUNING,
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline",
        help="Seconds after which missing answers are given up.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
EvaluateEvery = Annotated[
    int, typer.Option("--evaluate-every", help="Rounds between two evaluations.", rich_help_panel=_TRAINING)
]
EvaluationLimit = Annotated[
    int, typer.Option("--evaluation-limit", help="At most so many held-out examples.", rich_help_panel=_TRAINING)
]
TargetAccuracy = Annotated[
    float | None,
    typer.Option(
        "--target-accuracy",
        help="Stop as soon as an evaluation reaches it, 0 to 1.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
Deploy = Annotated[
    bool,
    typer.Option(
        "--deploy", help="Also write, for each class of devices, the checkpoint it would run.", rich_help_panel=_PRUNING
    ),
]
CutLayer = Annotated[
    str | None,
    typer.Option(
        "--cut-layer",
        help="Blocks on the devices, or auto: as fits their memory and links. Default: auto.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
BottomWay = Annotated[
    Way | None,
    typer.Option(
        "--bottom",
        help="Train LoRA or all weights on the devices. Default: lora.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
TopWay = Annotated[
    Way | None,
    typer.Option(
        "--top",
        help="Train LoRA or all weights on the server. Default: full.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
FeatureDtypeChoice = Annotated[
    FeatureDtype | None,
    typer.Option(
        "--feature-dtype",
        help="How features travel. Default: fp32.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
Ingress = Annotated[
    float | None,
    typer.Option(
        "--ingress",
        help="Megabytes of features that the server takes in an iteration. Default: those of --cohort devices with "
        "--batch-size rows each, in fp32.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
LargestBatch = Annotated[
    int | None,
    typer.Option(
        "--largest-batch",
        help="Most rows of a device's batch. Default: 64.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
DivergenceLimit = Annotated[
    float | None,
    typer.Option(
        "--divergence-limit",
        help="How far, in nats, merged labels may be from the fleet's. Default: 0.05.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
SelectionChoice = Annotated[
    Selection | None,
    typer.Option(
        "--selection",
        help="How the cohort is looked for. Default: greedy.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
OptimizerChoice = Annotated[
    Optimizer | None,
    typer.Option(
        "--optimizer",
        help="Optimizer of both halves. Default: adamw.",
        rich_help_panel=SPLIT,
        show_default=False,
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="Simulate the devices in this process (local), or start a process for each here (nvflare, flower).",
        rich_help_panel=_ENGINE,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        "--devices",
        help="Scale the fleet to so many devices.",
        min=1,
        show_default=False,
        rich_help_panel=_ENGINE,
    ),
]
Clock = Annotated[
    ClockName | None,
    typer.Option(
        "--clock",
        help="Whose seconds count: those that the fleet would need, or those that pass. Default: fleet for local, wall "
        "for nvflare and flower.",
        show_default=False,
        rich_help_panel=_ENGINE,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show where labels lie and what memory is needed; train nothing.")
]
