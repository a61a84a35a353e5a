"""What a federated run is asked for, and everything that must be right before it begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from spinecli.artifacts.manifest import ArtifactKind, Source, Step, lineage_behind
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions, compute_options
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.data.encoding import Encoded, encode
from spinecli.data.rows import opening_of
from spinecli.data.splits import Splits, load_splits
from spinecli.errors import FederationError, OptionError
from spinecli.federation.config import FederateConfig
from spinecli.federation.engine import Engine, Node
from spinecli.federation.loop import ReadyFederation
from spinecli.federation.memory import (
    DeviceGroup,
    MemoryNeed,
    TrainingMemory,
    needs_of,
    objection,
    places_of,
    sitting_out,
)
from spinecli.federation.planning.artifact import LoraPlan, read_plan
from spinecli.federation.planning.workload import head_of
from spinecli.federation.run import set_up
from spinecli.federation.simulation.fleet import Fleet, load_fleet
from spinecli.federation.simulation.partition import LabelTable, group_column, label_table, parse_partition, partition
from spinecli.federation.strategies import strategy_of
from spinecli.federation.strategies.server import AdapterServer
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.factors import target_projections

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FederatedRequest:
    """A checked config with everything opened."""

    config: FederateConfig
    compute: ComputeOptions
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
        return int(self.train.lengths.max()) if self.parts else self.config.data.max_length

    def places(self) -> list[DeviceGroup]:
        """The fleet's devices by what they hold."""
        sizes = [len(part) for part in self.parts] or [self.config.train.batch_size] * len(self.fleet.devices)
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
            inputs["plan"] = Source(reference=str(self.config.plan), files=dict(self.plan.manifest.outputs))
        return inputs

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        config = self.config
        here = ("engine", "clock") if config.engine.name == "local" else ()
        unused = {*here, *(found.name for found in FederateConfig.fields() if not _used(found.path, config))}
        resolved: dict[str, JsonValue] = {
            **config.parameters(),
            "clock": config.clock,
            "learning_rate": config.learning_rate,
            "targets": list(target_projections(self.checkpoint.family, config.lora.targets)),
        }
        return {name: value for name, value in resolved.items() if name not in unused}

    @property
    def kind(self) -> ArtifactKind:
        """What a run makes of it."""
        return "federated-adapter"

    @property
    def title(self) -> str:
        """Of the picture of its rounds."""
        return f"{self.config.strategy} on {self.fleet.name}"

    def needs(self, places: Sequence[DeviceGroup] | None = None) -> list[MemoryNeed]:
        """What the strategy asks of the devices' memory; empty for a strategy that does not say.

        Args:
            places: the devices that have enrolled; None: those of the fleet.
        """
        config, checkpoint = self.config, self.checkpoint
        places = self.places() if places is None else places
        strategy = strategy_of(config.strategy)
        if not (isinstance(strategy, type) and issubclass(strategy, AdapterServer)):
            return []
        server: type[AdapterServer] = strategy
        head = head_of(checkpoint, self.labels)
        targets = target_projections(checkpoint.family, config.lora.targets)
        costs = TrainingCosts.of(checkpoint, targets, head.weights, head.per_token, head_trained=head.trained)
        rows, length, weight = config.train.batch_size, config.data.max_length, self.compute.dtype.itemsize
        memory = TrainingMemory(costs, checkpoint.shapes, rows, length, weight)
        limits = {place.memory_bytes for place in places}

        def menu(place: DeviceGroup) -> list[Sequence[int]]:
            return server.menu(config.lora, checkpoint.blocks, self.plan, place.memory_bytes, limits)

        def least(place: DeviceGroup) -> int:
            return memory.needed(menu(place)[0])

        def most(place: DeviceGroup) -> tuple[int, str]:
            offered = menu(place)
            ranks = (memory.fitting(offered, place.memory_bytes) or offered[:1])[-1]
            return memory.needed(ranks), _in_words(ranks)

        return needs_of(places, least, most)

    def memory_objection(self, needs: Sequence[MemoryNeed]) -> str | None:
        """Why a run with these needs cannot begin; None if it can."""
        name = self.config.strategy
        strategy = strategy_of(name)
        leaves_out = bool(getattr(strategy, "leaves_out", False))
        rank = "--smallest-rank" if leaves_out and name != "legend" else "--rank"
        other = "" if name == "legend" else "take legend, which trains as many blocks as each device holds, "
        remedy = f"lower --batch-size, --max-length or {rank}, {other}or name a fleet with more memory"
        return objection(needs, name, remedy, leaves_out=leaves_out)

    def require_memory(self) -> None:
        """Raise OptionError if the memory of the fleet does not hold what the strategy asks of its devices."""
        if self.fleet.devices and (refused := self.memory_objection(self.needs())):
            raise OptionError(refused)

    def require_memory_of(self, nodes: Sequence[Node]) -> None:
        """Raise FederationError if the memory of devices that have enrolled does not; note those that will sit out."""
        needs = self.needs(places_of((node.device_class, node.memory_bytes, node.examples) for node in nodes))
        if refused := self.memory_objection(needs):
            raise FederationError(refused)
        for note in sitting_out(needs, self.config.strategy):
            _LOG.warning("%s", note)

    def set_up(self, engine: Engine | None = None) -> ReadyFederation[Any]:
        """Load what a run needs.

        Args:
            engine: where the devices are; None simulates the fleet in this process.

        Raises: FederationError if the devices do not hold what the strategy asks of them.
        """
        return set_up(self, engine)

    def label_table(self) -> LabelTable:
        """Where the labels lie, by device class."""
        classes = [device.device_class.name for device in self.fleet.devices]
        return label_table(self.splits.train, self.parts, classes)


def _in_words(ranks: Sequence[int]) -> str:
    held = [rank for rank in ranks if rank]
    span = f"rank {held[0]}" if held[0] == held[-1] else f"ranks {held[0]} to {held[-1]}"
    return f"{span} in {'all' if len(held) == len(ranks) else f'the last {len(held)} of'} {len(ranks)} blocks"


def open_request(config: FederateConfig, *, deal: bool = True) -> FederatedRequest:
    """Check what is asked for against checkpoint, fleet and data, and deal the data out.

    Args:
        deal: False where the data are held out alone, and the devices have their own.

    Raises: OptionError, FleetError, DataError, and every class of `spinecli.errors` that a checkpoint can cause.
    """
    if not config.splits:
        strategy_of(config.strategy)
    compute, data = compute_options(config.device, config.dtype), config.data
    fleet = load_fleet(config.fleet, config.engine.devices)
    checkpoint = Checkpoint.open(resolve_checkpoint(config.model))
    target_projections(checkpoint.family, config.lora.targets)
    plan = None
    if config.plan is not None:
        plan = read_plan(config.plan)
        plan.require(fleet, checkpoint.blocks)
        _require_same_targets(plan, checkpoint, config)
    if checkpoint.positions is not None and data.max_length > checkpoint.positions:
        raise OptionError(f"--max-length {data.max_length} exceeds the model's {checkpoint.positions} positions.")
    scheme = parse_partition(data.partition)
    splits = load_splits(
        data.train, data.evaluation, data.evaluation_share, config.seed, data.examples, group_column(scheme)
    )
    if splits.train.task == "language" and checkpoint.family.kind == "encoder":
        raise OptionError(f"{config.model} is an encoder and learns labels only; {data.train} has none.")
    parts = partition(splits.train, len(fleet.devices), scheme, config.seed) if deal else []
    tokenizer = tokenizer_of(checkpoint)
    vocabulary = int(checkpoint.config.vocab_size)
    evaluation = splits.evaluation.subset(_spread(len(splits.evaluation), config.train.evaluation_limit))
    source = describe_source(config.model, checkpoint.path)
    return FederatedRequest(
        config=config,
        compute=compute,
        checkpoint=checkpoint,
        source=source,
        lineage=lineage_behind(checkpoint.path, source),
        fleet=fleet,
        splits=splits,
        train=encode(splits.train, tokenizer, data.max_length, vocabulary=vocabulary),
        evaluation=encode(evaluation, tokenizer, data.max_length, vocabulary=vocabulary),
        parts=tuple(tuple(part) for part in parts),
        plan=plan,
        opening=tuple(tokenizer.convert_ids_to_tokens(list(opening_of(tokenizer)))),
    )


def _require_same_targets(plan: LoraPlan, checkpoint: Checkpoint, config: FederateConfig) -> None:
    planned = plan.manifest.parameters["targets"]
    if planned != list(target_projections(checkpoint.family, config.lora.targets)):
        raise OptionError(
            f"{config.plan} was planned for other projections than --targets {config.lora.targets}; give both the same."
        )


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, evenly spread."""
    return list(range(count)) if count <= limit else [index * count // limit for index in range(limit)]


def _used(path: tuple[str, ...], config: FederateConfig) -> bool:
    """Whether the strategy has a use for the field at a path."""
    if not config.splits:
        return path[0] != "split"
    return path[0] != "pruning" and path[-1] not in ("weighting", "smallest_rank", "largest_rank")
