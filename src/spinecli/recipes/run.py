"""Running a recipe: what has not changed is left as it is, and a killed chain goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spinecli import api
from spinecli.artifacts.context import RunContext, unheard
from spinecli.artifacts.manifest import MANIFEST_NAME, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import block_costs
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.config import Config
from spinecli.errors import OptionError, SpineError
from spinecli.exports.config import ExportConfig, Format, Quantization
from spinecli.healing.config import HealConfig
from spinecli.pruning.config import PruneConfig, TuneConfig
from spinecli.recipes.recipe import Recipe, RecipeStep

_CALLS: Mapping[str, Callable[..., api.Result]] = {
    "prune": api.prune,
    "tune": api.tune,
    "heal": api.heal,
    "plan": api.plan,
    "fed-launch": api.federate,
    "eval": api.evaluate,
    "sweep": api.sweep,
    "bench": api.bench,
    "export": api.export,
}
_BYTES = {Quantization.f32: 4.0, Quantization.f16: 2.0, Quantization.q8_0: 8.5 / 8, Quantization.q4_0: 4.5 / 8}


@dataclass(frozen=True)
class StepResult:
    """What has become of a step."""

    step: RecipeStep
    result: api.Result
    unchanged: bool
    """Whether it was there already, made from the same config and inputs."""


@dataclass(frozen=True)
class ExpectedStep:
    """What a step would do."""

    step: RecipeStep
    command_line: str
    place: Path
    exists: bool
    bytes: int | None
    """Of the checkpoint that it would write, by its parameters; None of what is no checkpoint."""


def run_recipe(
    recipe: Recipe,
    out: Path,
    context: RunContext | None = None,
    finished: Callable[[StepResult], None] = unheard,
) -> list[StepResult]:
    """Run a recipe into the directories `out/NAME`, one for each step.

    A step whose config and inputs, by their sums, are those that made what lies there is left as it is. Any other
    output of a spine command in its place is replaced. An export, which has no manifest, is written anew.

    Args:
        context: its note hears, before each step, the command line that does the same.
        finished: called after each step.

    Raises: what the steps raise, with the step's name in front.
    """
    context = context or RunContext()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{out} cannot be created ({error.strerror}); choose another --out.") from error
    places: dict[str, Path] = {}
    results = []
    for step in recipe.steps:
        config, place = step.config(places), step.place(out)
        context.note(f"$ {config.command_line(step.command, str(place))}")
        before = _started(place)
        try:
            result = _call(step, config, place, context)
        except SpineError as error:
            error.args = (f"Step {step.name}: {error}",)
            raise
        places[step.name] = place
        unchanged = before is not None and result.manifest is not None and result.manifest.measured.started == before
        results.append(StepResult(step, result, unchanged))
        finished(results[-1])
    return results


def expected(recipe: Recipe, out: Path) -> list[ExpectedStep]:
    """What running the recipe into `out` would do; nothing is computed.

    Raises: what opening the checkpoints that it begins with raises.
    """
    places: dict[str, Path] = {}
    sizes: dict[str, _Size] = {}
    steps = []
    for step in recipe.steps:
        config, place = step.config(places), step.place(out)
        size = _size_after(config, sizes)
        places[step.name] = place
        if size is not None:
            sizes[str(place)] = size
        line = config.command_line(step.command, str(place))
        steps.append(ExpectedStep(step, line, place, place.exists(), None if size is None else round(size.bytes)))
    return steps


def _call(step: RecipeStep, config: Config, place: Path, context: RunContext) -> api.Result:
    resume = {} if step.command == "export" else {"resume": True}
    return _CALLS[step.command](config, out=place, overwrite=True, progress=context.progress, **resume)


def _started(place: Path) -> str | None:
    return read_manifest(place).measured.started if (place / MANIFEST_NAME).is_file() else None


@dataclass(frozen=True)
class _Size:
    """Of a checkpoint that may not exist yet."""

    bytes: float
    block_bytes: float
    parameters: float

    def without(self, share: float) -> _Size:
        """After `share` of the block parameters has left."""
        kept = 1 - share * self.block_bytes / self.bytes
        return _Size(self.bytes * kept, self.block_bytes * (1 - share), self.parameters * kept)


def _size_after(config: Config, sizes: Mapping[str, _Size]) -> _Size | None:
    if isinstance(config, PruneConfig):
        return _size_of(config.model, sizes).without(config.sparsity)
    if isinstance(config, (TuneConfig, HealConfig)):
        return _size_of(str(config.pruned), sizes)
    if isinstance(config, ExportConfig):
        size = _size_of(config.model, sizes)
        if config.format is Format.hf:
            return size
        scale = _BYTES[config.quantize or Quantization.f16] * size.parameters / size.bytes
        return _Size(size.bytes * scale, size.block_bytes * scale, size.parameters)
    return None


def _size_of(reference: str, sizes: Mapping[str, _Size]) -> _Size:
    if reference in sizes:
        return sizes[reference]
    checkpoint = Checkpoint.open(resolve_checkpoint(reference))
    width = checkpoint.storage_dtype.itemsize
    blocks = sum(block_costs(checkpoint, index).block for index in range(checkpoint.blocks))
    return _Size(checkpoint.bytes, blocks * width, checkpoint.bytes / width)
