"""What `spine fed-launch` and `spine fed-server` are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from spinecli.config import Config, Device, Dtype, Model, Option, Seed
from spinecli.data.config import ExamplesConfig

Schedule = Literal["constant", "linear", "cosine"]
Weighting = Literal["examples", "equal"]
ScoreName = Literal["lora", "salience"]
TrainMode = Literal["lora", "full"]
"""Train LoRA factors beside frozen weights, or the weights themselves."""
FeatureDtype = Literal["fp32", "bf16", "int8"]
Optimizer = Literal["adamw", "sgd"]
SelectionName = Literal["greedy", "genetic", "priority", "random"]
Clock = Literal["fleet", "wall"]
"""Whose seconds an engine counts: those that a simulated fleet would have needed, or those that pass."""

SPLITTING = ("mergesfl", "sfl-fm", "sfl-br", "splitfed", "fedavg")
"""Strategies of `spinecli.federation.split`; all others send adapters."""

LEARNING_RATE = 1e-3
SPLIT_LEARNING_RATE = 2e-4
"""Where the model is split: lower than LoRA's, since the top's weights themselves are trained."""
SMALLEST_RATE = 1e-30
"""Of learning: steps of a tenth of it, where schedules end, still are numbers in float32."""


class DataConfig(Config):
    """Which examples are learned from, how they lie on the devices, and what the model is measured on."""

    train: Annotated[
        str,
        Option(
            "Training data: a .csv, .jsonl, .parquet or .txt file, a directory, a hub data set, or "
            "builtin:tiny-topics. For spine fed-server, whose devices have their own data, it is the held-out data.",
            name="data",
            decides=False,
        ),
    ]
    partition: Annotated[
        str,
        Option(
            "How to partition the data over the devices: iid, dirichlet:ALPHA, shards:LABELS, column or column:NAME."
        ),
    ] = "iid"
    evaluation: Annotated[
        str | None,
        Option(
            "Held-out data to evaluate on.", default="found next to the training data, or a share of it", decides=False
        ),
    ] = None
    evaluation_share: Annotated[
        float,
        Field(gt=0, lt=1),
        Option("Share of the training data to hold out if there is no held-out data.", decides=False),
    ] = 0.1
    examples: ExamplesConfig = ExamplesConfig()
    max_length: Annotated[
        int, Field(ge=2), Option("Length of the longest row in tokens; longer texts are truncated.")
    ] = 128


class TrainConfig(Config):
    """What happens in a round, and how often."""

    rounds: Annotated[int, Field(ge=1), Option("Number of rounds to run.")] = 50
    cohort: Annotated[
        int, Field(ge=1), Option("Number of devices that take part in a round; in split training, the largest number.")
    ] = 10
    local_steps: Annotated[
        int, Field(ge=1), Option("Number of training steps of a device in a round; in split training, of iterations.")
    ] = 20
    batch_size: Annotated[
        int,
        Field(ge=1),
        Option(
            "Number of rows in a training step. mergesfl and sfl-br start from it, and derive --ingress and the cut "
            "layer from it."
        ),
    ] = 16
    learning_rate: Annotated[
        float | None,
        Field(gt=0),
        Option(
            "Learning rate of the optimiser, without weight decay.",
            default=f"{LEARNING_RATE:g}, or {SPLIT_LEARNING_RATE:g} if the model is split",
        ),
    ] = None
    schedule: Annotated[
        Schedule, Option("Schedule of the learning rate over the rounds: constant, or falling to a tenth of it.")
    ] = "linear"
    clip_norm: Annotated[
        float, Field(gt=0), Option("Largest norm of a step's gradients; larger ones are scaled down to it.")
    ] = 1.0
    weighting: Annotated[
        Weighting,
        Option("Whether a device counts by its examples, or all devices equally; no effect if the model is split."),
    ] = "examples"
    deadline: Annotated[
        float | None,
        Field(gt=0),
        Option("Seconds after which a round stops waiting for answers; in split training, each exchange."),
    ] = None
    evaluate_every: Annotated[
        int, Field(ge=1), Option("Number of rounds from one evaluation to the next; the last round is evaluated, too.")
    ] = 1
    evaluation_limit: Annotated[int, Field(ge=1), Option("Largest number of held-out examples, spread evenly.")] = 2000
    target_accuracy: Annotated[
        float | None,
        Field(gt=0, le=1),
        Option("Stop after the first evaluation that reaches this accuracy, from 0 to 1."),
    ] = None

    @field_validator("learning_rate")
    @classmethod
    def _changes_weights(cls, rate: float | None) -> float | None:
        if rate is not None and rate < SMALLEST_RATE:
            raise ValueError(f"{rate:g} changes no weight in float32; take at least {SMALLEST_RATE:g}.")
        return rate

    def evaluates(self, round_number: int) -> bool:
        """Whether the model is measured after this round: every few, and after the last."""
        return (round_number + 1) % self.evaluate_every == 0 or round_number + 1 == self.rounds


class LoraConfig(Config):
    """Which projections are adapted, and with which ranks."""

    rank: Annotated[
        int,
        Field(ge=1),
        Option(
            "LoRA rank of strategies that use one rank for all devices; the mean rank of legend without a plan; the "
            "rank at which fedspine-model assumes that the gain saturates."
        ),
    ] = 8
    smallest_rank: Annotated[int, Field(ge=1), Option("Lowest rank for strategies that vary it.")] = 4
    largest_rank: Annotated[
        int,
        Field(ge=1),
        Option(
            "Highest rank for strategies that vary it, and the rank of the global adapter of fedspine and "
            "fedspine-model."
        ),
    ] = 16
    scale: Annotated[float, Field(gt=0), Option("Scale of LoRA, alpha / rank, at every rank.", name="lora-scale")] = 2.0
    targets: Annotated[
        str, Option("Projections with LoRA: all, attention, query-value, or names separated by commas.")
    ] = "all"

    @field_validator("largest_rank")
    @classmethod
    def _not_below_the_smallest(cls, largest: int, info: ValidationInfo) -> int:
        if largest < (smallest := info.data.get("smallest_rank", largest)):
            raise ValueError(f"{largest} is below --smallest-rank {smallest}; swap them.")
        return largest


class FleetPruningConfig(Config):
    """How far strategies that prune cut the model on the devices, and when."""

    sparsity: Annotated[
        float,
        Field(ge=0, lt=1),
        Option("Share of the block parameters that pruning strategies remove by the end, from 0 to below 1."),
    ] = 0.5
    prune_interval: Annotated[
        int,
        Field(ge=1),
        Option(
            "Number of local steps between two cuts. Another cut follows the last step; fedspine-model cuts once, "
            "before the first."
        ),
    ] = 20
    score: Annotated[
        ScoreName | None,
        Option(
            "How importance is measured: lora, only for projections with LoRA, or salience.",
            default="the strategy's own",
        ),
    ] = None
    deploy: Annotated[bool, Option("Also write the checkpoint that each class of devices would run.")] = False


def _read_cut(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number of blocks; give a number, or auto.") from None


class SplitConfig(Config):
    """Where the model is cut, what is trained of each half, and what crosses the cut. The head is part of the top."""

    cut_layer: Annotated[
        Literal["auto"] | int,
        BeforeValidator(_read_cut),
        Option(
            "Number of blocks on the devices, or auto, which fits it to their memory and links. spine fed-server needs "
            "a number."
        ),
    ] = "auto"
    bottom: Annotated[
        TrainMode,
        Option("What the devices train: lora beside frozen weights, or full, all weights including the embeddings."),
    ] = "lora"
    top: Annotated[TrainMode, Option("What the server trains: lora or full; it always trains the head.")] = "full"
    feature_dtype: Annotated[
        FeatureDtype, Option("Type in which features and their gradients are sent; int8 has a scale for each token.")
    ] = "fp32"
    ingress: Annotated[
        float | None,
        Field(gt=0),
        Option(
            "Limit on the features that the server accepts in an iteration, in megabytes (10^6 bytes).",
            default="those of --cohort devices with --batch-size rows of mean length each, in fp32",
        ),
    ] = None
    largest_batch: Annotated[
        int, Field(ge=1), Option("Largest number of rows in a device's batch; a larger --batch-size is lowered to it.")
    ] = 64
    divergence_limit: Annotated[
        float,
        Field(ge=0),
        Option(
            "Limit on the divergence of merged labels from the fleet's, in nats; rounds that cannot keep it are "
            "counted."
        ),
    ] = 0.05
    selection: Annotated[
        SelectionName,
        Option("How mergesfl selects a cohort: greedy and genetic consider labels, priority and random do not."),
    ] = "greedy"
    optimizer: Annotated[Optimizer, Option("Optimiser of both halves; sgd has no momentum.")] = "adamw"


class EngineConfig(Config):
    """What carries messages to devices, how many there are, and whose seconds count."""

    name: Annotated[
        Literal["local", "nvflare", "flower"],
        Option(
            "Engine that runs the devices: local simulates them in this process; nvflare and flower start a process "
            "for each on this machine, up to 32.",
            name="engine",
        ),
    ] = "local"
    devices: Annotated[
        int | None,
        Field(ge=1),
        Option("Number of devices to scale the fleet to; the shares of its classes are kept.", decides=False),
    ] = None
    clock: Annotated[
        Clock | None,
        Option(
            "Which seconds count: fleet, those that the fleet would need, or wall, those that pass.",
            default="fleet for local, wall for nvflare and flower",
        ),
    ] = None


class FederateConfig(Config):
    """Which model to fine-tune over which fleet, and how."""

    model: Model
    strategy: Annotated[
        str,
        Option(
            "Strategy of the run: fedspine, fedspine-model, fed-loraprune, legend, fedit, hetlora, flexlora, flora or "
            f"ffa-lora; or, to split the model, {', '.join(SPLITTING[:-1])} or {SPLITTING[-1]}."
        ),
    ] = "fedspine-model"
    fleet: Annotated[
        str, Option("Fleet to use: a .toml file, or jetson-N, phones-N or uniform-N for N devices.", decides=False)
    ] = "jetson-80"
    plan: Annotated[
        Path | None,
        Option("Directory that spine plan wrote for this fleet and checkpoint; legend starts from it.", decides=False),
    ] = None
    data: Annotated[DataConfig, Option("What is learned.", panel="Data")]
    train: Annotated[TrainConfig, Option("How it is learned.", panel="Rounds and training")] = TrainConfig()
    lora: Annotated[LoraConfig, Option("What is trained.", panel="LoRA")] = LoraConfig()
    pruning: Annotated[
        FleetPruningConfig,
        Option("What is cut.", panel="Pruning (fedspine, fedspine-model, fed-loraprune)"),
    ] = FleetPruningConfig()
    split: Annotated[
        SplitConfig,
        Option(
            "How the model is split.",
            panel=f"Split training ({', '.join(SPLITTING[:-1])} or {SPLITTING[-1]})",
        ),
    ] = SplitConfig()
    engine: Annotated[EngineConfig, Option("Where it runs.", panel="Devices and engine")] = EngineConfig()
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"

    @property
    def splits(self) -> bool:
        """Whether the strategy is one of split training."""
        return self.strategy in SPLITTING

    @property
    def learning_rate(self) -> float:
        """That of the first round: as asked for, or what is usual for the strategy."""
        usual = SPLIT_LEARNING_RATE if self.splits else LEARNING_RATE
        return usual if self.train.learning_rate is None else self.train.learning_rate

    @property
    def clock(self) -> Clock:
        """Whose seconds count: as asked for, or what is usual for the engine."""
        return self.engine.clock or ("fleet" if self.engine.name == "local" else "wall")

    @model_validator(mode="after")
    def _goes_together(self) -> FederateConfig:
        usual = SplitConfig()
        changed = [found for found in SplitConfig.fields() if self.split.value_of(found) != usual.value_of(found)]
        if changed and not self.splits:
            raise ValueError(f"{changed[0].flag} belongs to split training; {self.strategy} does not use it.")
        if self.pruning.deploy and self.splits:
            raise ValueError(
                f"--deploy has no effect with {self.strategy}, which writes the joined checkpoint; drop it."
            )
        if self.engine.name == "flower" and self.splits:
            raise ValueError(
                f"--engine flower does not run {self.strategy}: Flower starts a process on the device for every "
                "message, which takes seconds, and split training exchanges messages at every step; take --engine "
                "nvflare or local."
            )
        if self.engine.name == "local" and self.engine.clock == "wall":
            raise ValueError(
                "--clock wall needs devices that take their own time; add --engine nvflare or flower, or drop it."
            )
        return self
