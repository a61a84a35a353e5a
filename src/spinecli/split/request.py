"""What a split run is asked for, and everything that must be right before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pydantic import JsonValue

from spinecli.errors import OptionError
from spinecli.federation.planning.workload import Head, head_of
from spinecli.federation.request import FederatedRequest
from spinecli.split.control.options import ControlOptions
from spinecli.split.cost import SplitCosts
from spinecli.split.cut_layer import choose_cut, iteration_of
from spinecli.split.features import FeatureDtype, bytes_per_token
from spinecli.split.messages import Optimizer
from spinecli.split.model import Ways
from spinecli.split.strategies import SPLIT_STRATEGIES, SplitStrategy


@dataclass(frozen=True)
class SplitOptions:
    """The options of `spine fed-launch` that only split strategies have."""

    cut_layer: int | None = None
    """Blocks of the bottom; None: chosen from fleet and model."""
    ways: Ways = field(default_factory=Ways)
    """Its rank, scale and targets are those of the run."""
    feature_dtype: FeatureDtype = "fp32"
    optimizer: Optimizer = "adamw"
    largest_batch: int = 64
    """D."""
    divergence_limit: float = 0.05
    """eps, in nats."""
    ingress_mb: float | None = None
    """Megabytes of features an iteration that the server takes; None: those of --cohort devices with --batch-size
    rows each, in fp32."""
    selection: str = "greedy"


@dataclass(frozen=True, eq=False)
class SplitRequest:
    """A federated request with what splitting adds to it."""

    federated: FederatedRequest
    options: SplitOptions
    strategy: SplitStrategy
    cut: int
    head: Head
    row_bytes: float
    """Of one row's features in a message, on average over the training data."""
    ingress_bytes: float
    """Of features an iteration, at most."""

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        known = self.federated.parameters()
        own = ("smallest_rank", "largest_rank", "sparsity", "prune_interval", "score", "deploy")
        options = self.options
        return {
            **{name: value for name, value in known.items() if name not in own},
            "cut_layer": self.cut,
            "bottom": options.ways.bottom,
            "top": options.ways.top,
            "feature_dtype": options.feature_dtype,
            "optimizer": options.optimizer,
            "largest_batch": options.largest_batch,
            "divergence_limit": options.divergence_limit,
            "ingress_bytes": self.ingress_bytes,
            "selection": options.selection,
        }

    def control(self) -> ControlOptions:
        """What the control module is told under this strategy."""
        federated = self.federated.options
        general = ControlOptions(
            largest_batch=max(self.options.largest_batch, federated.tuning.batch_size),
            divergence_limit=self.options.divergence_limit,
            budget_rows=self.ingress_bytes / self.row_bytes,
            largest_cohort=federated.cohort,
            equal_batch=federated.tuning.batch_size,
            selection=self.options.selection,
        )
        return self.strategy.control(general)

    def costs(self) -> SplitCosts:
        """Of both halves."""
        return SplitCosts.of(self.federated.checkpoint, self.cut, self.options.ways, self.head, self.options.optimizer)


def split_request(federated: FederatedRequest, options: SplitOptions) -> SplitRequest:
    """Check the options of splitting against checkpoint, fleet and data.

    Raises: OptionError.
    """
    strategy = SPLIT_STRATEGIES[federated.options.strategy]
    checkpoint, tuning = federated.checkpoint, federated.options.tuning
    head = head_of(checkpoint, federated.labels)
    lengths = federated.train.lengths.double()
    token_bytes = bytes_per_token(checkpoint.d_model, options.feature_dtype)
    plain_bytes = float(lengths.mean()) * bytes_per_token(checkpoint.d_model, "fp32")
    if options.ingress_mb is not None and not 0 < options.ingress_mb < math.inf:
        raise OptionError(f"--ingress must be above 0 megabytes, not {options.ingress_mb:g}.")
    ingress = (
        options.ingress_mb * 1e6
        if options.ingress_mb is not None
        else federated.options.cohort * tuning.batch_size * plain_bytes
    )
    cut = checkpoint.blocks if not strategy.split else _cut(federated, options, head)
    return SplitRequest(federated, options, strategy, cut, head, float(lengths.mean()) * token_bytes, ingress)


def _cut(federated: FederatedRequest, options: SplitOptions, head: Head) -> int:
    checkpoint, tuning = federated.checkpoint, federated.options.tuning
    if checkpoint.blocks < 2:
        raise OptionError(f"{federated.options.model} has one block and cannot be split; name a deeper model.")
    if options.cut_layer is not None:
        if not 1 <= options.cut_layer < checkpoint.blocks:
            raise OptionError(
                f"--cut-layer {options.cut_layer} must leave blocks on both sides: from 1 to {checkpoint.blocks - 1}."
            )
        return options.cut_layer
    length = int(federated.train.lengths.max())
    asked = {}
    for cut in range(1, checkpoint.blocks):
        costs = SplitCosts.of(checkpoint, cut, options.ways, head, options.optimizer)
        asked[cut] = iteration_of(costs, tuning.batch_size, length)
    message = tuning.batch_size * length * bytes_per_token(checkpoint.d_model, options.feature_dtype)
    return choose_cut(asked, message, federated.fleet, federated.options.seed)
