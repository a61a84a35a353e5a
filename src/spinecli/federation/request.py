"""What a federated run is asked for, and everything that must be right before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.manifest import Source, Step, lineage_behind
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.data.encoding import Encoded, encode
from spinecli.data.example_columns import DataOptions
from spinecli.data.rows import opening_of
from spinecli.data.splits import Splits, load_splits
from spinecli.errors import OptionError
from spinecli.federation.engine import Clock
from spinecli.federation.memory import DeviceGroup, places_of
from spinecli.federation.planning.artifact import LoraPlan, read_plan
from spinecli.federation.rounds import RoundOptions
from spinecli.federation.schedule import Schedule
from spinecli.federation.simulation.fleet import Fleet, load_fleet
from spinecli.federation.simulation.label_table import LabelTable, label_table
from spinecli.federation.simulation.partition import options_for, parse_partition, partition
from spinecli.federation.strategies import SPLITTING, strategy_of
from spinecli.federation.strategies.strategy import TrainConfig
from spinecli.lora.factors import target_projections

_MOST_EVALUATED = 2000
SMALLEST_RATE = 1e-30
"""Of learning: steps of a tenth of it, where schedules end, still are numbers in float32."""


@dataclass(frozen=True)
class FederateConfig:
    """The options of `spine fed-launch`."""

    model: str
    data: str
    strategy: str = "fedspine-model"
    fleet: str = "jetson-80"
    devices: int | None = None
    """Scale the fleet to so many; None: as it is."""
    engine: str = "local"
    clock: Clock = "fleet"
    plan: Path | None = None
    partition: str = "iid"
    evaluation: str | None = None
    evaluation_share: float = 0.1
    """Of the training data, held out if there is no evaluation set."""
    data_options: DataOptions = field(default_factory=DataOptions)
    max_length: int = 128
    rounds: int = 50
    cohort: int = 10
    deadline: float | None = None
    tuning: TrainConfig = field(default_factory=TrainConfig)
    """Its rounds and length are those above."""
    targets: str = "all"
    schedule: Schedule = "linear"
    clip_norm: float = 1.0
    evaluate_every: int = 1
    evaluation_limit: int = _MOST_EVALUATED
    """At most so many held-out examples."""
    target_accuracy: float | None = None
    deploy: bool = False
    seed: int = 0
    compute: ComputeOptions = field(default_factory=ComputeOptions)


@dataclass(frozen=True, eq=False)
class FederatedRequest:
    """Checked options with everything opened."""

    options: FederateConfig
    checkpoint: Checkpoint
    source: Source
    lineage: tuple[Step, ...]
    fleet: Fleet
    splits: Splits
    train: Encoded
    evaluation: Encoded
    parts: tuple[tuple[int, ...], ...]
    """Examples of each device, in the fleet's order."""
    plan: LoraPlan | None
    opening: tuple[str, ...] = ()
    """What the tokenizer begins every text with."""

    @property
    def labels(self) -> int | None:
        """Number of labels; None for a language model."""
        return len(self.splits.train.labels) if self.splits.train.task == "classification" else None

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a device may have; of rows that lie elsewhere only the limit is known."""
        return int(self.train.lengths.max()) if self.parts else self.options.max_length

    def places(self) -> list[DeviceGroup]:
        """The fleet's devices by what they hold."""
        sizes = [len(part) for part in self.parts] or [self.options.tuning.batch_size] * len(self.fleet.devices)
        kinds = [(spec.device_class.name, spec.device_class.memory_bytes) for spec in self.fleet.devices]
        return places_of((name, memory, size) for (name, memory), size in zip(kinds, sizes, strict=True))

    @property
    def inputs(self) -> dict[str, Source]:
        """Identity of what the run is made from."""
        inputs = {
            "model": self.source,
            "fleet": self.fleet.source(),
            "data": self.splits.train.source(),
            "evaluation": self.splits.evaluation.source(),
        }
        if self.plan is not None:
            inputs["plan"] = Source(reference=str(self.options.plan), files=dict(self.plan.manifest.outputs))
        return inputs

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        options, tuning = self.options, self.options.tuning
        elsewhere: dict[str, JsonValue] = {"engine": options.engine, "clock": options.clock}
        return {
            **(elsewhere if options.engine != "local" else {}),
            "strategy": options.strategy,
            "partition": options.partition,
            "max_length": options.max_length,
            "rounds": options.rounds,
            "cohort": options.cohort,
            "deadline": options.deadline,
            "rank": tuning.rank,
            "smallest_rank": tuning.smallest_rank,
            "largest_rank": tuning.largest_rank,
            "scale": tuning.scale,
            "local_steps": tuning.local_steps,
            "batch_size": tuning.batch_size,
            "learning_rate": tuning.learning_rate,
            "weighting": tuning.weighting,
            "sparsity": tuning.sparsity,
            "prune_interval": tuning.prune_interval,
            "score": tuning.score,
            "targets": list(target_projections(self.checkpoint.family, options.targets)),
            "schedule": options.schedule,
            "clip_norm": options.clip_norm,
            "evaluate_every": options.evaluate_every,
            "evaluation_limit": options.evaluation_limit,
            "target_accuracy": options.target_accuracy,
            "deploy": options.deploy,
            "dtype": str(options.compute.dtype).removeprefix("torch."),
        }

    def round_options(self) -> RoundOptions:
        """The options of the loop."""
        options = self.options
        return RoundOptions(
            rounds=options.rounds,
            cohort=options.cohort,
            schedule=options.schedule,
            clip_norm=options.clip_norm,
            deadline=options.deadline,
            evaluate_every=options.evaluate_every,
            target_accuracy=options.target_accuracy,
        )

    def label_table(self) -> LabelTable:
        """Where the labels lie, by device class."""
        classes = [device.device_class.name for device in self.fleet.devices]
        return label_table(self.splits.train, self.parts, classes)


def open_request(options: FederateConfig, *, deal: bool = True) -> FederatedRequest:
    """Check the options against checkpoint, fleet and data, and deal the data out.

    Args:
        deal: False where the data are held out alone, and the devices have their own.

    Raises: OptionError, FleetError, DataError, and every class of `spinecli.errors` that a checkpoint can cause.
    """
    _check_options(options)
    if options.strategy not in SPLITTING:
        strategy_of(options.strategy)
    fleet = load_fleet(options.fleet, options.devices)
    checkpoint = Checkpoint.open(resolve_checkpoint(options.model))
    target_projections(checkpoint.family, options.targets)
    plan = None
    if options.plan is not None:
        plan = read_plan(options.plan)
        plan.require(fleet, checkpoint.blocks)
        _require_same_targets(plan, checkpoint, options)
    if checkpoint.positions is not None and options.max_length > checkpoint.positions:
        raise OptionError(f"--max-length {options.max_length} exceeds the model's {checkpoint.positions} positions.")
    scheme = parse_partition(options.partition)
    splits = load_splits(
        options.data,
        options.evaluation,
        options.evaluation_share,
        options.seed,
        options_for(scheme, options.data_options),
    )
    if splits.train.task == "language" and checkpoint.family.kind == "encoder":
        raise OptionError(f"{options.model} is an encoder and learns labels only; {options.data} has none.")
    parts = partition(splits.train, len(fleet.devices), scheme, options.seed) if deal else []
    tokenizer = tokenizer_of(checkpoint)
    vocabulary = int(checkpoint.config.vocab_size)
    evaluation = splits.evaluation.subset(_spread(len(splits.evaluation), options.evaluation_limit))
    source = describe_source(options.model, checkpoint.path)
    return FederatedRequest(
        options=options,
        checkpoint=checkpoint,
        source=source,
        lineage=lineage_behind(checkpoint.path, source),
        fleet=fleet,
        splits=splits,
        train=encode(splits.train, tokenizer, options.max_length, vocabulary=vocabulary),
        evaluation=encode(evaluation, tokenizer, options.max_length, vocabulary=vocabulary),
        parts=tuple(tuple(part) for part in parts),
        plan=plan,
        opening=tuple(tokenizer.convert_ids_to_tokens(list(opening_of(tokenizer)))),
    )


def _require_same_targets(plan: LoraPlan, checkpoint: Checkpoint, options: FederateConfig) -> None:
    planned = plan.manifest.parameters["targets"]
    if planned != list(target_projections(checkpoint.family, options.targets)):
        raise OptionError(
            f"{options.plan} was planned for other projections than --targets {options.targets}; give both the same."
        )


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, evenly spread."""
    return list(range(count)) if count <= limit else [index * count // limit for index in range(limit)]


def _check_options(options: FederateConfig) -> None:
    """Refuse values that no run can have; NaN fails every comparison and so is refused, too."""
    tuning = options.tuning
    positive = {
        "--rounds": options.rounds,
        "--cohort": options.cohort,
        "--local-steps": tuning.local_steps,
        "--batch-size": tuning.batch_size,
        "--rank": tuning.rank,
        "--smallest-rank": tuning.smallest_rank,
        "--prune-interval": tuning.prune_interval,
        "--evaluate-every": options.evaluate_every,
        "--evaluation-limit": options.evaluation_limit,
    }
    for name, count in positive.items():
        if count < 1:
            raise OptionError(f"{name} must be at least 1, not {count}.")
    if tuning.largest_rank < tuning.smallest_rank:
        raise OptionError(
            f"--largest-rank {tuning.largest_rank} is below --smallest-rank {tuning.smallest_rank}; swap them."
        )
    for name, value in (
        ("--learning-rate", tuning.learning_rate),
        ("--lora-scale", tuning.scale),
        ("--clip-norm", options.clip_norm),
        ("--deadline", options.deadline),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"{name} must be above 0, not {value:g}.")
    if tuning.learning_rate < SMALLEST_RATE:
        raise OptionError(
            f"--learning-rate {tuning.learning_rate:g} changes no weight in float32; take at least {SMALLEST_RATE:g}."
        )
    if not 0 <= tuning.sparsity < 1:
        raise OptionError(f"--sparsity must be at least 0 and below 1, not {tuning.sparsity:g}.")
    if options.target_accuracy is not None and not 0 < options.target_accuracy <= 1:
        raise OptionError(f"--target-accuracy must be above 0 and at most 1, not {options.target_accuracy:g}.")
