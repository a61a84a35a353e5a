"""What a prune run is asked for, and everything that must be right before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from pydantic import JsonValue

from spinecli.artifacts.manifest import Source, Step, lineage_behind
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import block_costs
from spinecli.checkpoints.cutting import Heads, can_vary, head_counts
from spinecli.checkpoints.family import families
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.rows import CalibrationOptions, TokenRows, calibration_rows
from spinecli.errors import OptionError
from spinecli.pruning.adaptive.allocation import AdaptiveBudget
from spinecli.pruning.allocation import Budget
from spinecli.pruning.method import Method
from spinecli.pruning.methods import METHODS
from spinecli.pruning.methods.comp import DEFAULT_METRIC, METRICS
from spinecli.pruning.selection import protected_blocks


class Widths(str, Enum):
    """Which blocks may differ in width."""

    uniform = "uniform"
    """None: the result is a plain checkpoint."""
    adaptive = "adaptive"
    """All: each gets the width that it needs, and the checkpoint ships its modules."""


@dataclass(frozen=True)
class PruneConfig:
    """The options of `spine prune`."""

    model: str
    sparsity: float
    method: str = "spine"
    metric: str | None = None
    """Reading of COMP's neuron metric; None takes its default."""
    block_share: float | None = None
    """Share of the budget spent on whole blocks; None chooses it by comparison."""
    protect: tuple[int, ...] | None = None
    """Blocks that stay, negative ones counted from the end; None takes the default rule."""
    heads: Heads = Heads.auto
    widths: Widths | None = None
    """None makes all blocks alike, unless those of the model differ already."""
    round_to: int = 8
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    seed: int = 0
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        return {
            "sparsity": self.sparsity,
            "method": self.method,
            "metric": (self.metric or DEFAULT_METRIC) if self.method == "comp" else None,
            "block_share": "auto" if self.block_share is None and _splits(self.method) else self.block_share,
            "widths": self.widths.value if self.widths else None,
            "protect": None if self.protect is None else list(self.protect),
            "heads": self.heads.value,
            "round_to": self.round_to,
            "calibration_rows": self.calibration.rows,
            "calibration_length": self.calibration.length,
            "special_tokens": self.calibration.special_tokens.value,
            "dtype": str(self.compute.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True, eq=False)
class PruneRequest:
    """Checked options with everything opened."""

    options: PruneConfig
    checkpoint: Checkpoint
    source: Source
    lineage: tuple[Step, ...]
    calibration: TokenRows
    method: Method
    protected: frozenset[int]
    budget: Budget | None
    """Of a cut that leaves all blocks alike; None where they differ already."""
    adaptive: AdaptiveBudget | None
    """Of a cut that lets blocks differ; None if they must not."""

    @property
    def searches(self) -> bool:
        """Whether allocations are compared on calibration rows."""
        return _splits(self.options.method) and self.options.block_share is None

    @property
    def search_rows(self) -> int:
        """Calibration rows on which allocations are compared: enough to rank them."""
        return min(self.calibration.rows, 64)

    @property
    def held_out_rows(self) -> int:
        """Of the search rows, those that judge."""
        return max(1, self.search_rows // 4)


def open_request(options: PruneConfig) -> PruneRequest:
    """Check the options against the checkpoint; cheap mistakes are found before expensive reading.

    Raises: OptionError and every class of `spinecli.errors` that a checkpoint or a text can cause.
    """
    method = _method(options)
    checkpoint = Checkpoint.open(resolve_checkpoint(options.model))
    protected = _protected(options, checkpoint.blocks)
    channels = max(shape.channels for shape in checkpoint.shapes)
    if options.round_to > channels:
        raise OptionError(f"--round-to {options.round_to} exceeds the model's {channels} channels.")
    widths = _widths(options, checkpoint, method)
    calibration = calibration_rows(checkpoint, options.model, options.calibration)
    request = PruneRequest(
        options=options,
        checkpoint=checkpoint,
        source=(source := describe_source(options.model, checkpoint.path)),
        lineage=lineage_behind(checkpoint.path, source),
        calibration=calibration,
        method=method,
        protected=protected,
        budget=_uniform_budget(options, checkpoint, protected) if checkpoint.is_uniform else None,
        adaptive=_adaptive_budget(options, checkpoint, protected) if widths is Widths.adaptive else None,
    )
    if (request.searches or request.adaptive or method.refits) and calibration.rows < 4:
        raise OptionError(
            f"--method {method.name} with these options compares and fits on calibration rows and needs at least 4, "
            f"not {calibration.rows}; raise --calibration-rows, and name a longer text if it is too short for them."
        )
    return request


def at_sparsity(request: PruneRequest, sparsity: float) -> PruneRequest:
    """The same request for another sparsity, with nothing opened again.

    Raises: OptionError if the sparsity is out of range.
    """
    options = replace(request.options, sparsity=sparsity)
    _method(options)
    return replace(
        request,
        options=options,
        budget=request.budget and replace(request.budget, sparsity=sparsity),
        adaptive=request.adaptive and replace(request.adaptive, sparsity=sparsity),
    )


def _uniform_budget(options: PruneConfig, checkpoint: Checkpoint, protected: frozenset[int]) -> Budget:
    kinds_of = checkpoint.attention_kinds
    kinds = set(kinds_of)
    return Budget(
        sparsity=options.sparsity,
        blocks=checkpoint.blocks,
        removable_blocks=checkpoint.blocks - len(protected) - len(kinds - {kinds_of[index] for index in protected}),
        costs=block_costs(checkpoint),
        kv_heads=tuple(heads // checkpoint.shape.group_size for heads in head_counts(checkpoint, options.heads)),
        round_to=options.round_to,
    )


def _adaptive_budget(options: PruneConfig, checkpoint: Checkpoint, protected: frozenset[int]) -> AdaptiveBudget:
    return AdaptiveBudget(
        sparsity=options.sparsity,
        costs=[block_costs(checkpoint, index) for index in range(checkpoint.blocks)],
        round_to=options.round_to,
        protected=protected,
        heads_leave=options.heads is not Heads.keep,
    )


def _widths(options: PruneConfig, checkpoint: Checkpoint, method: Method) -> Widths:
    """What the options and the model's blocks allow; OptionError if they contradict each other."""
    default = Widths.uniform if checkpoint.is_uniform else Widths.adaptive
    widths = options.widths or default
    if widths is Widths.uniform and not checkpoint.is_uniform:
        raise OptionError(f"The blocks of {options.model} differ in width already; prune them with --widths adaptive.")
    if widths is Widths.adaptive and not method.refits:
        raise OptionError(f"--widths adaptive belongs to --method spine; {method.name} keeps all blocks alike.")
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


def _method(options: PruneConfig) -> Method:
    if not 0 < options.sparsity < 1:
        raise OptionError(f"--sparsity must lie between 0 and 1, not {options.sparsity:g}.")
    if options.method not in METHODS:
        raise OptionError(f"There is no method {options.method!r}; choose one of {', '.join(METHODS)}.")
    if options.metric not in (None, *METRICS):
        raise OptionError(f"There is no metric {options.metric!r}; choose one of {', '.join(METRICS)}.")
    if options.method != "comp" and options.metric is not None:
        raise OptionError(f"--metric belongs to --method comp; {options.method} has no such choice.")
    if not _splits(options.method) and options.block_share is not None:
        raise OptionError(f"--block-share belongs to --method spine or comp; {options.method} has no such choice.")
    if options.block_share is not None and not 0 <= options.block_share <= 1:
        raise OptionError(f"--block-share must be auto or lie between 0 and 1, not {options.block_share:g}.")
    if options.round_to < 1:
        raise OptionError(f"--round-to must be at least 1, not {options.round_to}.")
    return METHODS[options.method](options.metric or DEFAULT_METRIC, options.seed)


def _protected(options: PruneConfig, blocks: int) -> frozenset[int]:
    if options.protect is None:
        return protected_blocks(blocks)
    for index in options.protect:
        if not -blocks <= index < blocks:
            raise OptionError(f"--protect names block {index}, but the model has blocks 0 to {blocks - 1}.")
    return frozenset(index % blocks for index in options.protect)
