"""A recipe: named steps, each a command and its config, in which `${name}` stands for what an earlier step wrote.

steps:
pruned:
prune: {model: builtin:tiny, sparsity: 0.3}
tuned:
tune: {pruned: "${pruned}"}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spinecli.artifacts.manifest import read_manifest
from spinecli.config import Config, read_config
from spinecli.errors import ForeignArtifactError, MissingPathError, OptionError, RecipeError, reason_of
from spinecli.evaluation.bench.config import BenchConfig
from spinecli.evaluation.config import EvaluateConfig
from spinecli.evaluation.sweep.config import SweepConfig
from spinecli.exports.config import ExportConfig, Format
from spinecli.federation.config import FederateConfig
from spinecli.federation.planning.config import PlanConfig
from spinecli.healing.config import HealConfig
from spinecli.pruning.config import PruneConfig, TuneConfig

KINDS: Mapping[str, type[Config]] = {
    "prune": PruneConfig,
    "tune": TuneConfig,
    "heal": HealConfig,
    "plan": PlanConfig,
    "fed-launch": FederateConfig,
    "eval": EvaluateConfig,
    "sweep": SweepConfig,
    "bench": BenchConfig,
    "export": ExportConfig,
}
"""What each command that a step may name is asked for."""
_NAMES = {
    "prune": "pruned",
    "tune": "tuned",
    "heal": "healed",
    "eval": "results",
    "plan": "plan",
    "fed-launch": "federated",
    "sweep": "sweep",
    "bench": "bench",
}
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class RecipeStep:
    """One command of a recipe."""

    name: str
    command: str
    values: Mapping[str, Any]
    """Its config as the recipe has it, with references to earlier steps."""

    @property
    def kind(self) -> type[Config]:
        """The class of its config."""
        return KINDS[self.command]

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps whose output it reads, in the order of their mention."""
        return tuple(dict.fromkeys(_references(self.values)))

    def config(self, places: Mapping[str, Path]) -> Config:
        """What the command is asked for when the earlier steps lie at `places`.

        Raises: OptionError that names the step.
        """
        try:
            return read_config(self.kind, None, _replaced(self.values, lambda name: str(places[name])))
        except OptionError as error:
            raise OptionError(f"Step {self.name}: {error}") from None

    def place(self, out: Path) -> Path:
        """Where its output lies when the recipe is run into `out`."""
        gguf = self.command == "export" and self.values.get("format") == Format.gguf.value
        return out / (f"{self.name}.gguf" if gguf else self.name)


@dataclass(frozen=True)
class Recipe:
    """A chain of commands."""

    steps: tuple[RecipeStep, ...]

    def as_yaml(self) -> str:
        """The file that says the same."""
        steps = {step.name: {step.command: dict(step.values)} for step in self.steps}
        return str(yaml.safe_dump({"steps": steps}, sort_keys=False, allow_unicode=True))


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe: its commands, its options, and what its steps refer to.

    Raises: MissingPathError, RecipeError, OptionError.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingPathError(f"{file} does not exist; name a recipe.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as YAML ({reason_of(error)}); fix it.") from error
    steps = found.get("steps") if isinstance(found, dict) and set(found) == {"steps"} else None
    if not isinstance(steps, dict) or not steps:
        raise RecipeError(f"{file} must hold only named steps, each with a command and its options.")
    known: dict[str, Path] = {}
    read = []
    for name, said in steps.items():
        step = _step(str(name), said)
        for needed in step.needs:
            if needed not in known:
                raise RecipeError(f"Step {step.name} refers to ${{{needed}}}, and no step before it has that name.")
        known[step.name] = step.place(Path())
        step.config(known)
        read.append(step)
    return Recipe(tuple(read))


def recipe_of(directory: Path) -> Recipe:
    """The chain of commands that made a directory, as far as its manifest knows it.

    Raises: MissingPathError, ForeignArtifactError, DamagedArtifactError.
    """
    manifest = read_manifest(directory)
    made = [*manifest.lineage, manifest.as_step(str(directory))]
    names: dict[str, str] = {}
    steps = []
    for step in made:
        if not step.config:
            continue
        if step.command not in KINDS:
            raise ForeignArtifactError(f"{step.reference} was made by spine {step.command}, which no recipe can run.")
        values = _with_references(step.config, names)
        name = _unused(_NAMES[step.command], names.values())
        steps.append(RecipeStep(name, step.command, values))
        names[step.reference] = f"${{{name}}}"
    if not steps:
        raise ForeignArtifactError(f"{directory} does not record the options of its command; write it again.")
    return Recipe(tuple(steps))


def last_config(directory: Path) -> str:
    """What the command that made a directory was asked for, as a file for its `--config`.

    Raises: MissingPathError, ForeignArtifactError, DamagedArtifactError.
    """
    manifest = read_manifest(directory)
    if not manifest.config:
        raise ForeignArtifactError(f"{directory} does not record the options of its command; write it again.")
    head = f"# spine {manifest.command} --config THIS --out DIR\n"
    return head + str(yaml.safe_dump(manifest.config, sort_keys=False, allow_unicode=True))


def _step(name: str, said: Any) -> RecipeStep:
    if not _NAME.fullmatch(name):
        raise RecipeError(f"A step cannot be called {name!r}; take letters, digits, and -, _ or . after the first.")
    if not isinstance(said, dict) or len(said) != 1 or not isinstance(next(iter(said.values())), dict):
        raise RecipeError(f"Step {name} must hold one command with its options, such as prune: {{model: DIR}}.")
    ((command, values),) = said.items()
    if command not in KINDS:
        raise RecipeError(f"Step {name} names the command {command!r}; a recipe knows {', '.join(KINDS)}.")
    return RecipeStep(name, command, values)


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [name for each in value.values() for name in _references(each)]
    if isinstance(value, (list, tuple)):
        return [name for each in value for name in _references(each)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def _replaced(value: Any, place_of: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _replaced(each, place_of) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(each, place_of) for each in value]
    return _REFERENCE.sub(lambda match: place_of(match[1]), value) if isinstance(value, str) else value


def _with_references(value: Any, names: Mapping[str, str]) -> Any:
    """A config in which the outputs of known steps are references to them; what nothing was said of is left out."""
    if isinstance(value, Mapping):
        found = {name: _with_references(each, names) for name, each in value.items()}
        return {name: each for name, each in found.items() if each not in (None, {}, [])}
    if isinstance(value, (list, tuple)):
        return [_with_references(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value


def _unused(name: str, taken: Any) -> str:
    found, count = name, 1
    while f"${{{found}}}" in taken:
        count += 1
        found = f"{name}-{count}"
    return found
