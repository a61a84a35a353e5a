"""What a split run is asked for, and everything that must be right before it begins.

Where to cut: what fits every class of devices, and as deep as costs next to no time.

Features are (tokens, d_model) wherever a transformer is cut, so a deeper cut sends no fewer of them, and takes longer:
the devices compute more, and their bottoms are larger. What it buys is that features are further from the texts they
come from, and work taken off the server. So the cut is the deepest one whose iterations take the slowest device at most
a tenth longer than those of the shallowest. This rule is this project's own, see docs/algorithms/mergesfl.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import JsonValue

from spinecli.artifacts.manifest import ArtifactKind
from spinecli.errors import OptionError
from spinecli.federation.engine import Engine
from spinecli.federation.loop import ReadyFederation
from spinecli.federation.memory import DeviceGroup, MemoryNeed, needs_of, objection
from spinecli.federation.planning.workload import Head, head_of
from spinecli.federation.request import FederatedRequest
from spinecli.federation.simulation.conditions import Conditions, conditions
from spinecli.federation.simulation.fleet import Fleet
from spinecli.federation.split.control.plan import ControlOptions
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.messages import bytes_per_token
from spinecli.federation.split.model import require_precision
from spinecli.federation.split.run import set_up


@dataclass(frozen=True)
class SplitStrategy:
    """What of MergeSFL a strategy does."""

    merged: bool
    """The server trains on all features as one batch, and not on each device's apart."""
    selected: bool
    """Devices and batches are chosen so that the merged labels are like those of the fleet, and not at random."""
    regulated: bool
    """Batches follow the devices' paces, and are not all equal."""
    split: bool = True
    """The server has a half at all, and not only averages."""


SPLIT_STRATEGIES = {
    "mergesfl": SplitStrategy(merged=True, selected=True, regulated=True),
    "sfl-fm": SplitStrategy(merged=True, selected=False, regulated=False),
    "sfl-br": SplitStrategy(merged=False, selected=False, regulated=True),
    "splitfed": SplitStrategy(merged=False, selected=False, regulated=False),
    "fedavg": SplitStrategy(merged=False, selected=False, regulated=False, split=False),
}
"""By the name that --strategy takes."""


_SLACK = 1.1


@dataclass(frozen=True)
class Demand:
    """What an iteration of a cut asks of a device."""

    memory_bytes: int
    """With a whole batch."""
    flops: int
    """Of one row."""
    feature_bytes: int
    """Of one row; the gradients that come back are as many."""
    bottom_bytes: float
    """Of the bottom, which travels once a round, shared out over the round's iterations."""

    def seconds(self, now: Conditions) -> float:
        """Of an iteration with one row under these conditions."""
        size = self.feature_bytes + self.bottom_bytes
        transfer = now.upload_seconds(0) + now.download_seconds(0)
        transfer += 8 * size / now.up_bits_per_second + 8 * size / now.down_bits_per_second
        return now.compute_seconds(self.flops) + transfer


def choose_cut(demands: Mapping[int, Demand], fleet: Fleet, seed: int) -> int:
    """The cut, given what each possible one asks for.

    Args:
        demands: by the number of blocks in the bottom.
        seed: of the fleet's conditions; those of the first round count, with jitter at its median.

    Raises: OptionError naming the class that cannot hold even the shallowest bottom.
    """
    smallest = min(fleet.classes, key=lambda found: found.memory_bytes)
    fitting = [cut for cut, demand in sorted(demands.items()) if demand.memory_bytes <= smallest.memory_bytes]
    if not fitting:
        shallowest = min(demands)
        raise OptionError(
            f"Devices of class {smallest.name} have {smallest.memory_gb:g} GB, and the bottom model cut before block "
            f"{shallowest} needs {demands[shallowest].memory_bytes / 1e9:.2g} GB; lower --batch-size or --max-length."
        )
    present = [replace(conditions(device, seed, 0), jitter=1.0) for device in fleet.devices]
    slowest = {cut: max(demands[cut].seconds(now) for now in present) for cut in fitting}
    return max(cut for cut in fitting if slowest[cut] <= _SLACK * slowest[fitting[0]])


_ROUNDING = 1e-9


def rows_within(ingress_bytes: float, row_bytes: float) -> float:
    """How many rows fit. Bytes that were made from whole rows hold them all, whatever rounding does on the way."""
    return ingress_bytes / row_bytes * (1 + _ROUNDING)


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitRequest(FederatedRequest):
    """A federated request with what splitting adds to it."""

    strategy: SplitStrategy
    cut: int
    head: Head
    row_bytes: float
    """Of one row's features in a message, on average over the training data."""
    ingress_bytes: float
    """Of features an iteration, at most."""

    @property
    def kind(self) -> ArtifactKind:
        """What a run makes of it."""
        return "joined-checkpoint"

    @property
    def title(self) -> str:
        """Of the picture of its rounds."""
        return f"{super().title}, cut before block {self.cut}"

    @property
    def row_budget(self) -> float:
        """Rows of features an iteration that the ingress takes."""
        return rows_within(self.ingress_bytes, self.row_bytes)

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        known = {name: value for name, value in super().parameters().items() if name != "ingress"}
        return {**known, "cut_layer": self.cut, "ingress_bytes": self.ingress_bytes}

    def control(self) -> ControlOptions:
        """What the control module is told under this strategy."""
        config, strategy = self.config, self.strategy
        return ControlOptions(config.split, config.train, self.row_budget, strategy.regulated, strategy.selected)

    def needs(self, places: Sequence[DeviceGroup] | None = None) -> list[MemoryNeed]:
        """What the strategy asks of the devices' memory.

        Where batches follow the devices, one row is enough; elsewhere all batches have to be as large as was asked.

        Args:
            places: the devices that have enrolled; None: those of the fleet.
        """
        costs, length = self.costs(), self.longest
        largest = self.config.split.largest_batch
        asked = min(self.config.train.batch_size, largest)

        def least_rows(place: DeviceGroup) -> int:
            return 1 if self.strategy.regulated else min(asked, place.examples)

        def least(place: DeviceGroup) -> int:
            return costs.device_memory(least_rows(place), length)

        def most(place: DeviceGroup) -> tuple[int, str]:
            rows = least_rows(place)
            if self.strategy.regulated:
                held = costs.rows_held(length, place.memory_bytes)
                rows = max(rows, min(largest, math.floor(self.row_budget), place.examples, held))
            blocks = f"{self.cut} of {self.checkpoint.blocks} blocks"
            return costs.device_memory(rows, length), f"{blocks}, {rows} row{'s' if rows > 1 else ''}"

        return needs_of(self.places() if places is None else places, least, most)

    def memory_objection(self, needs: Sequence[MemoryNeed]) -> str | None:
        """Why a run with these needs cannot begin; None if it can."""
        regulated, split = self.strategy.regulated, self.strategy.split
        rows = [] if regulated else ["--batch-size"]
        options = " or ".join([*rows, "--max-length", *(["--cut-layer"] if split and self.cut > 1 else [])])
        other = "" if regulated else "take mergesfl, which gives each device as many rows as it holds, "
        remedy = f"lower {options}, {other}or name a fleet with more memory"
        return objection(needs, self.config.strategy, remedy, leaves_out=False)

    def set_up(self, engine: Engine | None = None) -> ReadyFederation[Any]:
        """Load what a run needs.

        Args:
            engine: where the devices are; None simulates the fleet in this process.

        Raises: FederationError if the devices do not hold what the strategy asks of them, or count other labels.
        """
        return set_up(self, engine)

    def costs(self) -> SplitCosts:
        """Of both halves."""
        return SplitCosts.of(self.checkpoint, self.cut, self.config.split, self.config.lora, self.head)


def split_request(federated: FederatedRequest) -> SplitRequest:
    """Check the options of splitting against checkpoint, fleet and data.

    Raises: OptionError.
    """
    config, checkpoint = federated.config, federated.checkpoint
    require_precision(config.split, federated.compute.dtype)
    strategy = SPLIT_STRATEGIES[config.strategy]
    head = head_of(checkpoint, federated.labels)
    lengths = federated.train.lengths.double()
    token_bytes = bytes_per_token(checkpoint.d_model, config.split.feature_dtype)
    plain_bytes = float(lengths.mean()) * bytes_per_token(checkpoint.d_model, "fp32")
    ingress = (
        config.split.ingress * 1e6
        if config.split.ingress is not None
        else config.train.cohort * config.train.batch_size * plain_bytes
    )
    if config.split.cut_layer != "auto" and not strategy.split:
        raise OptionError(f"--cut-layer has no effect with {config.strategy}, which does not split; drop it.")
    cut = checkpoint.blocks if not strategy.split else _cut(federated, head)
    request = SplitRequest(
        **{field.name: getattr(federated, field.name) for field in fields(FederatedRequest)},
        strategy=strategy,
        cut=cut,
        head=head,
        row_bytes=float(lengths.mean()) * token_bytes,
        ingress_bytes=ingress,
    )
    request.control()
    return request


def _cut(federated: FederatedRequest, head: Head) -> int:
    config, checkpoint = federated.config, federated.checkpoint
    if checkpoint.blocks < 2:
        raise OptionError(f"{config.model} has one block and cannot be split; name a deeper model.")
    if (asked := config.split.cut_layer) != "auto":
        if not 1 <= asked < checkpoint.blocks:
            raise OptionError(
                f"--cut-layer {asked} must leave blocks on both sides: from 1 to {checkpoint.blocks - 1}."
            )
        return asked
    if not federated.fleet.devices:
        raise OptionError(
            "--cut-layer auto depends on the devices' memory and links, which are unknown until they join; give a "
            f"number of blocks, from 1 to {checkpoint.blocks - 1}."
        )
    regulated = SPLIT_STRATEGIES[config.strategy].regulated
    smallest = min(found.memory_bytes for found in federated.fleet.classes)
    whole = config.train.batch_size
    for rows in (whole, 1) if regulated else (whole,):
        demands = {cut: _demand(federated, head, cut, rows) for cut in range(1, checkpoint.blocks)}
        if demands[1].memory_bytes <= smallest:
            return choose_cut(demands, federated.fleet, config.seed)
    return 1  # which is refused when a run begins, as any cut would be


def _demand(federated: FederatedRequest, head: Head, cut: int, rows: int) -> Demand:
    config, checkpoint, length = federated.config, federated.checkpoint, federated.longest
    costs = SplitCosts.of(checkpoint, cut, config.split, config.lora, head)
    return Demand(
        memory_bytes=costs.bottom_memory(rows, length),
        flops=costs.bottom(1, length).flops,
        feature_bytes=length * bytes_per_token(checkpoint.d_model, config.split.feature_dtype),
        bottom_bytes=costs.bottom_parameters() * 4 / config.train.local_steps,
    )
