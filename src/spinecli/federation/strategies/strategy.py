"""What a strategy is: it orders every device of a round to do something, and learns from the answers.

A strategy sees what a real server sees: what devices said when they enrolled, timestamps, bytes, losses, and what came
back. It never sees a device's speed, links or data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.federation.client.local_pruning import Importance, PrunableUnits, kept_units
from spinecli.federation.config import FederateConfig, ScoreName
from spinecli.federation.engine import Lost, Node, Snapshot, Timing
from spinecli.federation.memory import TrainingMemory
from spinecli.federation.planning.artifact import LoraPlan
from spinecli.lora.aggregation.contribution import Contribution
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.factors import Adapter


@dataclass(frozen=True)
class Projection:
    """One adapted projection."""

    block: int
    d_out: int
    d_in: int


@dataclass(frozen=True, eq=False)
class StrategyContext:
    """What every strategy knows before the first round."""

    config: FederateConfig
    nodes: Sequence[Node]
    projections: Mapping[str, Projection]
    """By full name, in the model's order."""
    shapes: Sequence[BlockShape]
    """Of the base model's blocks."""
    uniform_cuts: Callable[[], PrunableUnits]
    """What can leave the blocks; raises OptionError where they differ in width."""
    costs: TrainingCosts
    head: Mapping[str, Tensor]
    """Where the classification head starts; empty for language models."""
    family: Family
    bytes_per_weight: int = 4
    plan: LoraPlan | None = None
    """Where LEGEND starts from, if the user has made a plan."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.shapes)

    @property
    def memory(self) -> TrainingMemory:
        """What training takes on a device, uncut, with whole batches of the longest rows."""
        rows, length = self.config.train.batch_size, self.config.data.max_length
        return TrainingMemory(self.costs, self.shapes, rows, length, self.bytes_per_weight)

    @property
    def cuts(self) -> PrunableUnits:
        """What can leave the blocks; OptionError where they differ in width, so that no strategy can prune them."""
        return self.uniform_cuts()

    def kept_units(self, masks: Masks | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Kept rows and kept columns of the adapted projections that `masks` cut, as indices by full name."""
        if masks is None:
            return {}, {}
        shapes = {name: (projection.d_out, projection.d_in) for name, projection in self.projections.items()}
        return kept_units(masks, self.family, self.shapes, shapes)


@dataclass(frozen=True, eq=False)
class Ratio:
    """How a device is to prune in a round."""

    target: float
    final: float
    """Where it will stand after all rounds."""
    score: ScoreName
    collect_only: bool = False
    importance: Sequence[Importance] | None = None
    """Where the device's importance starts from, so that it can cut before its first step; None: its own memory."""


@dataclass(frozen=True, eq=False)
class TrainInstruction:
    """What one device is to do in a round."""

    ranks: tuple[int, ...]
    """LoRA rank of each block; 0: none."""
    adapter: Adapter
    """The factors it starts from, in the shape of its masks."""
    head: Mapping[str, Tensor]
    shared_a: bool = False
    """A is frozen, drawn from the run's seed on every device, and never travels."""
    folded: Adapter = field(default_factory=dict)
    pruning: Ratio | None = None


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What one device sent back, checked."""

    device: str
    contribution: Contribution
    """Its factors, with the same weight."""
    head: Mapping[str, Tensor]
    weight: float
    """Its share in a mean before it is normalised: the number of its examples, or 1; see `TrainConfig.weighting`."""
    loss_before: float
    loss_after: float
    forward_seconds: float
    backward_seconds: float
    timing: Timing
    ratio: float
    masks: Masks | None
    importance: Sequence[Importance] | None
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DeployedModel:
    """The model that a group of devices would run now."""

    group: str
    """A device class, or `all`."""
    devices: int
    masks: Masks | None
    ratio: float


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """What the server has learned so far: one adapter and head, and whose model is cut how."""

    adapter: Adapter
    head: Mapping[str, Tensor]
    served: Sequence[DeployedModel]


class Strategy(Protocol):
    """One way to fine-tune over a fleet."""

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """What each device of the cohort is to do; devices left out sit this round out."""

    def aggregate_train(self, round_number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
        """Learn from a round's answers; `updates` may be empty."""

    def model(self) -> GlobalModel:
        """The model as it stands."""

    def masks_of(self, device: str) -> Masks | None:
        """The masks that a device last reported and the server accepted; None if it has cut nothing."""

    def snapshot(self) -> Snapshot:
        """What `restore` needs to go on from here."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
