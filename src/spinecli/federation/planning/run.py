"""`spine plan` as a library call: predict, configure, compare, publish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from spinecli.artifacts.directory import OutputOptions, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.family import Family
from spinecli.errors import OptionError
from spinecli.federation.config import LoraConfig
from spinecli.federation.planning.artifact import PLAN_KIND, PlanTensors
from spinecli.federation.planning.prediction import (
    FleetFigures,
    PlanOutcome,
    Prediction,
    Predictor,
    first_speeds,
    memory_limits,
    uniform_outcome,
)
from spinecli.federation.planning.request import PlanRequest
from spinecli.lora.peft_format import CONFIG_NAME, plain_config
from spinecli.lora.planning.configuration import Configuration, configure
from spinecli.lora.planning.ranks import rank_distribution, ranks_by_device


def adapter_config(
    family: Family, base: str, targets: Sequence[str], ranks: Sequence[int], labels: int | None
) -> dict[str, JsonValue]:
    """LoRA in the last blocks of a model, each with its own rank.

    Written key by key instead of by PEFT, so that the bytes do not depend on its version.

    Args:
        base: the checkpoint as the user named it.
        targets: adapted projections, relative to a block.
        ranks: one per block, 0 where a block has no LoRA; at least one is not 0.
        labels: of a trained classification head, None without one.
    """
    container = family.blocks.rpartition(".")[2]
    held = {index: rank for index, rank in enumerate(ranks) if rank}
    pattern: dict[str, JsonValue] = {rf"{container}\.{index}\..+": rank for index, rank in held.items()}
    highest = max(held.values())
    return {
        **plain_config("CAUSAL_LM" if labels is None else "SEQ_CLS", base, highest, pattern, int(LoraConfig().scale)),
        "target_modules": list(targets),
        "exclude_modules": list(_also_matched(family, targets)) or None,
        "layers_to_transform": list(held),
        "layers_pattern": container,
        "modules_to_save": None if labels is None else [family.classification_head],
        "inference_mode": False,
    }


def _also_matched(family: Family, targets: Sequence[str]) -> tuple[str, ...]:
    """Projections that PEFT would adapt unasked, as it compares names from their end: BERT has two `output.dense`."""
    return tuple(
        name
        for name in family.projections
        if name not in targets and any(name.endswith(f".{target}") for target in targets)
    )


PICTURE_NAME = "plan.png"

_COMPUTE, _TRANSFER, _UNIFORM = "#4472c4", "#ed7d31", "#7f7f7f"


def save_picture(outcome: PlanOutcome, uniform: PlanOutcome, tensors: PlanTensors, path: Path) -> None:
    """Draw the devices' seconds under both plans, and the rank and the holders of every block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_seconds(left, outcome, uniform, tensors)
    _draw_blocks(right, outcome)
    figure.savefig(path, dpi=144, metadata={"Software": None})


def _draw_seconds(axis: Any, outcome: PlanOutcome, uniform: PlanOutcome, tensors: PlanTensors) -> None:
    order = outcome.seconds.argsort(stable=True)
    order = order[outcome.depths[order] > 0]
    places = torch.arange(1, len(order) + 1).tolist()
    compute = tensors.compute_seconds[order].tolist()
    axis.fill_between(places, 0, compute, step="mid", color=_COMPUTE, label="compute", lw=0)
    whole = outcome.seconds[order].tolist()
    axis.fill_between(places, compute, whole, step="mid", color=_TRANSFER, label="transfer", lw=0)
    axis.axhline(outcome.round_seconds, color="black", lw=1, label="round")
    if uniform.round_seconds:
        others = uniform.seconds[uniform.depths > 0].sort().values
        axis.step(
            torch.arange(1, len(others) + 1).tolist(),
            others.tolist(),
            where="mid",
            color=_UNIFORM,
            lw=1,
            label="uniform plan",
        )
        axis.axhline(uniform.round_seconds, color=_UNIFORM, lw=1, ls="--", label="its round")
    axis.set_xlabel("devices, fastest first")
    axis.set_ylabel("seconds")
    axis.set_ylim(bottom=0)
    axis.set_title("a round; above the colours is waiting", fontsize=9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def _draw_blocks(axis: Any, outcome: PlanOutcome) -> None:
    blocks = len(outcome.ranks)
    axis.bar(range(blocks), outcome.ranks.tolist(), color=_COMPUTE, width=0.8)
    axis.set_xlabel("block, input to output")
    axis.set_ylabel("rank (bars)")
    holders = (outcome.depths[:, None] >= blocks - torch.arange(blocks)).sum(dim=0)
    share = axis.twinx()
    share.plot(range(blocks), (100 * holders / len(outcome.depths)).tolist(), "o-", color=_TRANSFER, ms=4)
    share.set_ylabel("devices that train it, % (line)")
    share.set_ylim(0, 105)
    axis.set_title("where LoRA is", fontsize=9)


CONFIGURATIONS = "configurations"


@dataclass(frozen=True, eq=False)
class PlanDecision:
    """The plan of a request, and the uniform plan beside it."""

    request: PlanRequest
    configuration: Configuration
    prediction: Prediction
    outcome: PlanOutcome
    uniform: PlanOutcome
    tensors: PlanTensors

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        found, fleet = self.configuration, self.request.fleet
        classes = [device.device_class.name for device in fleet.devices]
        uniform = self.uniform.by_class(classes)
        budget = self.request.goals().traffic_budget
        return {
            "rank_distribution": found.ranks.tolist(),
            "asked_ranks": self.request.ranks.tolist(),
            "plan": _json(self.outcome.figures()),
            "uniform": _json(self.uniform.figures()),
            "classes": [
                {"name": name, "plan": _json(figures), "uniform": _json(uniform[name])}
                for name, figures in self.outcome.by_class(classes).items()
            ],
            "goals": {
                "max_waiting": self.request.config.max_waiting,
                "meets_waiting": found.meets_waiting,
                "traffic_budget_bytes": budget,
                "meets_traffic": found.meets_traffic,
            },
            "configurations": [
                {
                    "name": configuration_name(depth),
                    "depth": depth,
                    "ranks": found.ranks[-depth:].tolist(),
                    "devices": int((found.depths == depth).sum()),
                    "message_bytes": int(self.prediction.costs.message_bytes[depth - 1]),
                    "memory_bytes": int(self.prediction.costs.memory_bytes[depth - 1]),
                }
                for depth in self.depths
            ],
            "devices": [
                {
                    "name": device.name,
                    "class": device.device_class.name,
                    "configuration": configuration_name(depth) if depth else None,
                }
                for device, depth in zip(fleet.devices, found.depths.tolist(), strict=True)
            ],
        }

    @property
    def depths(self) -> list[int]:
        """Depths in use, rising."""
        return sorted(set(self.configuration.depths.tolist()) - {0})

    def summary(self) -> str:
        """One line for `spine inspect`."""
        figures = self.outcome.figures()
        least, most = figures.depths or (0, 0)
        return (
            f"{figures.taking_part} of {figures.devices} devices, depth {least} to {most} of "
            f"{len(self.outcome.ranks)}, round {figures.seconds:.3g} s, {figures.waiting:.0%} of it waiting"
        )


def configuration_name(depth: int) -> str:
    """Name of the configuration of a depth; its ranks follow from the plan's one rank distribution."""
    return f"depth-{depth:02d}"


def decide(request: PlanRequest, stopwatch: Stopwatch | None = None) -> PlanDecision:
    """Make the plan; writes nothing.

    Raises: OptionError if no device can hold the least depth.
    """
    stopwatch = stopwatch or Stopwatch()
    with stopwatch("computing"):
        limits = memory_limits(request.fleet)
        predictor = Predictor(request.workload, first_speeds(request.fleet, request.config.seed))
        _require_memory(request, predictor.predict(request.ranks), limits)
        found = configure(lambda ranks: predictor.predict(ranks).table, request.ranks, limits, request.goals())
        prediction = predictor.predict(found.ranks)
        uniform_ranks = rank_distribution(len(request.ranks), int(request.ranks.sum()), step=0)
        uniform = uniform_outcome(predictor.predict(uniform_ranks).table, uniform_ranks, limits)
        return PlanDecision(
            request=request,
            configuration=found,
            prediction=prediction,
            outcome=PlanOutcome.of(prediction.table, found.ranks, found.depths),
            uniform=uniform,
            tensors=_tensors(found, prediction, predictor.capacities(found.ranks).matrix),
        )


def plan(
    decision: PlanDecision, output: OutputOptions, stopwatch: Stopwatch | None = None, *, picture: bool = False
) -> Manifest:
    """Write a plan into a new directory, whole or not at all.

    A plan takes seconds, so there is nothing to resume: what a killed run left is thrown away.

    Raises: OutputExistsError, UnfinishedRunError (another process is writing), MissingPathError, NoSpaceError.
    """
    stopwatch, request = stopwatch or Stopwatch(), decision.request
    run = Run(
        PLAN_KIND, "plan", request.config, request.parameters(), request.config.seed, request.inputs, request.lineage
    )
    if finished := run.finished(output):
        return finished
    check_output(output, [request.checkpoint.path])
    with run.working(replace(output, overwrite=True)) as work:
        with stopwatch("writing"):
            decision.tensors.save(work.files)
            _write_configurations(decision, work.files / CONFIGURATIONS)
            if picture:
                save_picture(decision.outcome, decision.uniform, decision.tensors, work.files / PICTURE_NAME)
        return run.publish(work, decision.summary(), decision.report(), stopwatch.measured())


def _write_configurations(decision: PlanDecision, directory: Path) -> None:
    request, ranks = decision.request, decision.configuration.ranks
    for depth in decision.depths:
        config = adapter_config(
            request.checkpoint.family,
            request.config.model,
            request.workload.targets,
            ranks_by_device(ranks, torch.tensor([depth]))[0].tolist(),
            request.labels,
        )
        place = directory / configuration_name(depth)
        place.mkdir(parents=True)
        (place / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_memory(request: PlanRequest, prediction: Prediction, limits: Tensor) -> None:
    depth = request.config.min_depth
    needed = float(prediction.costs.memory_bytes[depth - 1])
    if needed > float(limits.max()):
        raise OptionError(
            f"No device of {request.fleet.reference} can train {request.config.model} at depth {depth}: that needs "
            f"{needed / 1e9:.2f} GB, and the largest has {float(limits.max()) / 1e9:.2f} GB; take a smaller "
            "checkpoint, --batch-size or --length, or --dtype bfloat16."
        )


def _tensors(found: Configuration, prediction: Prediction, capacities: Tensor) -> PlanTensors:
    table, depths = prediction.table, found.depths
    message = table.at(prediction.costs.message_bytes.expand_as(table.seconds), depths).long()
    return PlanTensors(
        rank_distribution=found.ranks,
        ranks=ranks_by_device(found.ranks, depths),
        depths=depths,
        compute_seconds=table.at(prediction.compute_seconds, depths),
        up_seconds=table.at(prediction.up_seconds, depths),
        down_seconds=table.at(prediction.down_seconds, depths),
        round_seconds=found.seconds,
        up_bytes=message,
        down_bytes=message,
        memory_bytes=table.at(table.memory_bytes, depths).long(),
        capacities=capacities,
    )


def _json(figures: FleetFigures) -> dict[str, JsonValue]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(figures).items()}
