"""What a plan is asked for, and everything that must be right before it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import JsonValue
from torch import Tensor

from spinecli.artifacts.manifest import Source, Step, lineage_behind
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.tokenizer import require_fitting_tokenizer
from spinecli.errors import OptionError
from spinecli.federation.planning.workload import LocalWork, Workload, head_of
from spinecli.federation.simulation.fleet import Fleet, load_fleet
from spinecli.lora.factors import target_projections
from spinecli.lora.planning.configuration import Goals
from spinecli.lora.planning.ranks import rank_distribution

DEFAULT_MAX_WAITING = 0.6
DEFAULT_COVERAGE = 0.5
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class PlanConfig:
    """The options of `spine plan`."""

    model: str
    fleet: str
    rank: float = 8.0
    """Mean rank of a block."""
    rank_step: int = 1
    targets: str = "all"
    batch_size: int = 16
    length: int = 128
    local_steps: int = 20
    labels: int | None = None
    """Labels of a trained classification head; None keeps the checkpoint's own task."""
    max_waiting: float = DEFAULT_MAX_WAITING
    coverage: float = DEFAULT_COVERAGE
    traffic_budget: float | None = None
    """Megabytes (10^6 bytes) a round, up and down, of all devices together."""
    min_depth: int = 1
    dtype: str = "float32"
    """Of the frozen weights in a device's memory."""
    seed: int = 0

    def goals(self) -> Goals:
        """What the planner has to keep."""
        budget = None if self.traffic_budget is None else self.traffic_budget * 1e6
        return Goals(self.max_waiting, self.coverage, self.min_depth, budget)


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """Checked options with everything opened."""

    options: PlanConfig
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
        options = self.options
        return {
            "rank": options.rank,
            "rank_step": options.rank_step,
            "targets": list(self.workload.targets),
            "batch_size": options.batch_size,
            "length": options.length,
            "local_steps": options.local_steps,
            "labels": self.labels,
            "max_waiting": options.max_waiting,
            "coverage": options.coverage,
            "traffic_budget": options.traffic_budget,
            "min_depth": options.min_depth,
            "dtype": options.dtype,
        }


def open_request(options: PlanConfig) -> PlanRequest:
    """Check the options against the checkpoint and the fleet.

    Raises: OptionError, FleetError, and every class of `spinecli.errors` that a checkpoint can cause.
    """
    _check_options(options)
    fleet = load_fleet(options.fleet)
    checkpoint = Checkpoint.open(resolve_checkpoint(options.model))
    require_fitting_tokenizer(checkpoint)
    labels = options.labels if options.labels is not None else checkpoint.labels
    if labels is None and checkpoint.family.kind == "encoder":
        raise OptionError(f"{options.model} is an encoder and predicts no next token; name the classes with --labels.")
    if options.min_depth > checkpoint.blocks:
        raise OptionError(f"--min-depth {options.min_depth} exceeds the model's {checkpoint.blocks} blocks.")
    if checkpoint.positions is not None and options.length > checkpoint.positions:
        raise OptionError(f"--length {options.length} exceeds the model's {checkpoint.positions} positions.")
    work = LocalWork(options.batch_size, options.length, options.local_steps, _WEIGHT_BYTES[options.dtype])
    targets = target_projections(checkpoint.family, options.targets)
    workload = Workload(checkpoint, targets, head_of(checkpoint, labels), work)
    ranks = rank_distribution(checkpoint.blocks, round(options.rank * checkpoint.blocks), options.rank_step)
    if int(ranks[-1]) > workload.narrowest():
        raise OptionError(
            f"--rank {options.rank:g} gives the last block rank {int(ranks[-1])}, but its narrowest projection has "
            f"room for {workload.narrowest()}; lower --rank or --rank-step."
        )
    source = describe_source(options.model, checkpoint.path)
    return PlanRequest(
        options=options,
        checkpoint=checkpoint,
        source=source,
        lineage=lineage_behind(checkpoint.path, source),
        fleet=fleet,
        workload=workload,
        ranks=ranks,
        labels=labels,
    )


def _check_options(options: PlanConfig) -> None:
    """Refuse values that no plan can be made with; NaN fails every comparison and so is refused, too."""
    at_least_one = {
        "--rank": options.rank,
        "--batch-size": options.batch_size,
        "--length": options.length,
        "--local-steps": options.local_steps,
        "--min-depth": options.min_depth,
    }
    for name, value in at_least_one.items():
        if not (value >= 1 and math.isfinite(value)):
            raise OptionError(f"{name} must be at least 1, not {value:g}.")
    if options.rank_step < 0:
        raise OptionError(f"--rank-step must be 0 or more, not {options.rank_step}; ranks rise toward the output.")
    if options.labels is not None and options.labels < 2:
        raise OptionError(f"--labels must be at least 2, not {options.labels}.")
    if not 0 <= options.max_waiting <= 1:
        raise OptionError(f"--max-waiting must be a share of the round from 0 to 1, not {options.max_waiting:g}.")
    if not 0 < options.coverage <= 1:
        raise OptionError(f"--coverage must be a share of the devices above 0 and up to 1, not {options.coverage:g}.")
    if options.traffic_budget is not None and not options.traffic_budget > 0:
        raise OptionError(f"--traffic-budget must be more than 0 MB, not {options.traffic_budget:g}.")
    if options.dtype not in _WEIGHT_BYTES:
        raise OptionError(f"There is no dtype {options.dtype!r}; choose one of {', '.join(_WEIGHT_BYTES)}.")
