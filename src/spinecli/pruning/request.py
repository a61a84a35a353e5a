"""What a prune run is asked for, and everything that must be right before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import JsonValue

from spinecli.artifacts.manifest import Source, Step, lineage_behind
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import block_costs
from spinecli.checkpoints.cutting import can_vary, head_counts
from spinecli.checkpoints.family import families
from spinecli.checkpoints.shape import Heads
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions, compute_options
from spinecli.data.calibration import Calibration, open_calibration
from spinecli.errors import OptionError
from spinecli.pruning.adaptive.allocation import AdaptiveBudget
from spinecli.pruning.allocation import Budget, protected_blocks
from spinecli.pruning.config import Effort, PruneConfig, Widths
from spinecli.pruning.method import BlocksAlone, Method
from spinecli.pruning.methods import METHODS
from spinecli.pruning.methods.comp import DEFAULT_METRIC, METRICS


@dataclass(frozen=True, eq=False)
class PruneRequest:
    """A checked config with everything opened."""

    config: PruneConfig
    compute: ComputeOptions
    checkpoint: Checkpoint
    source: Source
    lineage: tuple[Step, ...]
    calibration: Calibration
    method: Method
    protected: frozenset[int]
    budget: Budget | None
    """Of a cut that leaves all blocks alike; None where they differ already."""
    adaptive: AdaptiveBudget | None
    """Of a cut that lets blocks differ; None if they must not."""

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        config, comp = self.config, self.config.method == "comp"
        return {
            **config.parameters(),
            "metric": (config.metric or DEFAULT_METRIC) if comp else None,
            "block_share": config.block_share if _splits(config.method) else None,
        }

    @property
    def searches(self) -> bool:
        """Whether allocations are compared on calibration rows."""
        return self.splits and self.config.block_share == "auto" and self.config.effort is not Effort.fast

    @property
    def splits(self) -> bool:
        """Whether the method can split the budget between blocks and units."""
        return _splits(self.config.method)

    @property
    def scoring(self) -> Method:
        """What scores the blocks: the method, or, where it chooses units as it re-fits, one that leaves them alone."""
        return BlocksAlone() if self.method.refits and self.adaptive is None else self.method


def open_request(config: PruneConfig) -> PruneRequest:
    """Check what is asked for against the checkpoint; cheap mistakes are found before expensive reading.

    Raises: OptionError and every class of `spinecli.errors` that a checkpoint or a text can cause.
    """
    method = _method(config)
    checkpoint = Checkpoint.open(resolve_checkpoint(config.model))
    protected = _protected(config, checkpoint.blocks)
    channels = max(shape.channels for shape in checkpoint.shapes)
    if config.round_to > channels:
        raise OptionError(f"--round-to {config.round_to} exceeds the model's {channels} channels.")
    widths = _widths(config, checkpoint, method)
    compute, source = compute_options(config.device, config.dtype), describe_source(config.model, checkpoint.path)
    calibration = open_calibration(checkpoint, source, config.calibration, seed=config.seed, compute=compute)
    request = PruneRequest(
        config=config,
        compute=compute,
        checkpoint=checkpoint,
        source=source,
        lineage=lineage_behind(checkpoint.path, source),
        calibration=calibration,
        method=method,
        protected=protected,
        budget=_uniform_budget(config, checkpoint, protected) if checkpoint.is_uniform else None,
        adaptive=_adaptive_budget(config, checkpoint, protected) if widths is Widths.adaptive else None,
    )
    if (request.searches or request.adaptive or method.refits) and calibration.rows < 4:
        raise OptionError(
            f"--method {method.name} with these options compares and fits on calibration rows and needs at least 4, "
            f"not {calibration.rows}; raise --calibration-rows, and name a longer text if it is too short for them."
        )
    return request


def at_sparsity(request: PruneRequest, sparsity: float) -> PruneRequest:
    """The same request for another sparsity, which lies between 0 and 1, with nothing opened again."""
    return replace(
        request,
        config=request.config.model_copy(update={"sparsity": sparsity}),
        budget=request.budget and replace(request.budget, sparsity=sparsity),
        adaptive=request.adaptive and replace(request.adaptive, sparsity=sparsity),
    )


def _uniform_budget(config: PruneConfig, checkpoint: Checkpoint, protected: frozenset[int]) -> Budget:
    kinds_of = checkpoint.attention_kinds
    kinds = set(kinds_of)
    return Budget(
        sparsity=config.sparsity,
        blocks=checkpoint.blocks,
        removable_blocks=checkpoint.blocks - len(protected) - len(kinds - {kinds_of[index] for index in protected}),
        costs=block_costs(checkpoint),
        kv_heads=tuple(heads // checkpoint.shape.group_size for heads in head_counts(checkpoint, config.heads)),
        round_to=config.round_to,
    )


def _adaptive_budget(config: PruneConfig, checkpoint: Checkpoint, protected: frozenset[int]) -> AdaptiveBudget:
    return AdaptiveBudget(
        sparsity=config.sparsity,
        costs=[block_costs(checkpoint, index) for index in range(checkpoint.blocks)],
        round_to=config.round_to,
        protected=protected,
        heads_leave=config.heads is not Heads.keep,
    )


def _widths(config: PruneConfig, checkpoint: Checkpoint, method: Method) -> Widths:
    """What the options and the model's blocks allow; OptionError if they contradict each other."""
    default = Widths.uniform if checkpoint.is_uniform else Widths.adaptive
    widths = config.widths or default
    if widths is Widths.uniform and not checkpoint.is_uniform:
        raise OptionError(f"The blocks of {config.model} differ in width already; prune them with --widths adaptive.")
    if widths is Widths.adaptive and not method.refits:
        raise OptionError(
            f"--widths adaptive belongs to --method spine; {method.name} keeps the same widths in all blocks."
        )
    if widths is Widths.adaptive and not can_vary(checkpoint):
        able = ", ".join(name for name, family in families().items() if family.varied and name != family.varied)
        raise OptionError(
            f"The blocks of this {checkpoint.family.model_type} cannot differ in width; those of {able} can, without "
            "biases where llama has them. Use --widths uniform."
        )
    return widths


def _splits(name: str) -> bool:
    """Whether the budget can be split between blocks and units: the method cuts both."""
    method = METHODS[name](DEFAULT_METRIC, 0)
    return method.cuts_blocks and method.cuts_units


def _method(config: PruneConfig) -> Method:
    if config.method not in METHODS:
        raise OptionError(f"There is no method {config.method!r}; choose one of {', '.join(METHODS)}.")
    if config.metric not in (None, *METRICS):
        raise OptionError(f"There is no metric {config.metric!r}; choose one of {', '.join(METRICS)}.")
    if config.method != "comp" and config.metric is not None:
        raise OptionError(f"--metric belongs to --method comp; {config.method} has no such choice.")
    if not _splits(config.method) and config.block_share != "auto":
        raise OptionError(f"--block-share belongs to --method spine or comp; {config.method} has no such choice.")
    return METHODS[config.method](config.metric or DEFAULT_METRIC, config.seed)


def _protected(config: PruneConfig, blocks: int) -> frozenset[int]:
    if config.protect is None:
        return protected_blocks(blocks)
    for index in config.protect:
        if not -blocks <= index < blocks:
            raise OptionError(f"--protect names block {index}, but the model has blocks 0 to {blocks - 1}.")
    return frozenset(index % blocks for index in config.protect)
