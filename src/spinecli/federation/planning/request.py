"""What a plan is asked for, and everything that must be right before it is made."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue
from torch import Tensor

from spinecli.artifacts.manifest import Source, Step, lineage_behind
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.tokenizer import require_fitting_tokenizer
from spinecli.errors import OptionError
from spinecli.federation.planning.config import PlanConfig
from spinecli.federation.planning.workload import LocalWork, Workload, head_of
from spinecli.federation.simulation.fleet import Fleet, load_fleet
from spinecli.lora.factors import target_projections
from spinecli.lora.planning.configuration import Goals
from spinecli.lora.planning.ranks import rank_distribution

_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """A checked config with everything opened."""

    config: PlanConfig
    checkpoint: Checkpoint
    source: Source
    lineage: tuple[Step, ...]
    fleet: Fleet
    workload: Workload
    ranks: Tensor
    """(blocks,) int64: the distribution before any traffic goal lowers it."""
    labels: int | None

    @property
    def inputs(self) -> dict[str, Source]:
        """Identity of what the plan is made from."""
        return {"model": self.source, "fleet": self.fleet.source()}

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        return {
            **self.config.parameters(),
            "targets": list(self.workload.targets),
            "labels": self.labels,
        }

    def goals(self) -> Goals:
        """What the planner has to keep."""
        config = self.config
        budget = None if config.traffic_budget is None else config.traffic_budget * 1e6
        return Goals(config.max_waiting, config.coverage, config.min_depth, budget)


def open_request(config: PlanConfig) -> PlanRequest:
    """Check the options against the checkpoint and the fleet.

    Raises: OptionError, FleetError, and every class of `spinecli.errors` that a checkpoint can cause.
    """
    fleet = load_fleet(config.fleet)
    checkpoint = Checkpoint.open(resolve_checkpoint(config.model))
    require_fitting_tokenizer(checkpoint)
    labels = config.labels if config.labels is not None else checkpoint.labels
    if labels is None and checkpoint.family.kind == "encoder":
        raise OptionError(f"{config.model} is an encoder and predicts no next token; name the classes with --labels.")
    if config.min_depth > checkpoint.blocks:
        raise OptionError(f"--min-depth {config.min_depth} exceeds the model's {checkpoint.blocks} blocks.")
    if checkpoint.positions is not None and config.length > checkpoint.positions:
        raise OptionError(f"--length {config.length} exceeds the model's {checkpoint.positions} positions.")
    work = LocalWork(config.batch_size, config.length, config.local_steps, _WEIGHT_BYTES[config.dtype])
    targets = target_projections(checkpoint.family, config.targets)
    workload = Workload(checkpoint, targets, head_of(checkpoint, labels), work)
    ranks = rank_distribution(checkpoint.blocks, round(config.rank * checkpoint.blocks), config.rank_step)
    if int(ranks[-1]) > workload.narrowest():
        raise OptionError(
            f"--rank {config.rank:g} gives the last block rank {int(ranks[-1])}, but its narrowest projection has "
            f"room for {workload.narrowest()}; lower --rank or --rank-step."
        )
    source = describe_source(config.model, checkpoint.path)
    return PlanRequest(
        config=config,
        checkpoint=checkpoint,
        source=source,
        lineage=lineage_behind(checkpoint.path, source),
        fleet=fleet,
        workload=workload,
        ranks=ranks,
        labels=labels,
    )
