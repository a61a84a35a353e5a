"""The commands that led to a result, in the form in which a person types them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import yaml
from pydantic import JsonValue, ValidationError

from spinecli.artifacts.manifest import DENSE_KIND, Step
from spinecli.config import Config
from spinecli.evaluation.page.page import Command
from spinecli.healing.config import HealConfig
from spinecli.pruning.config import PruneConfig, TuneConfig

# Commands whose results are measured here and whose flags are known here. Others are told by their file for --config.
_CONFIGS: Mapping[str, type[Config]] = {"prune": PruneConfig, "tune": TuneConfig, "heal": HealConfig}


def commands_behind(steps: Sequence[Step]) -> tuple[Command, ...]:
    """The commands that made the inputs of a run, oldest first, each once."""
    made = [step for step in steps if step.kind != DENSE_KIND and step.command]
    return tuple(dict.fromkeys(_of_step(step) for step in made))


def _of_step(step: Step) -> Command:
    config = _config(step.command, step.config)
    if config is not None:
        return Command(config.command_line(step.command, step.reference), step.summary)
    out = shlex.quote(step.reference)
    if not step.config:
        return Command(f"spine {step.command} … --out {out}", f"{step.summary}; its options are not recorded")
    name = f"{step.command}.yaml"
    file = yaml.safe_dump(step.config, sort_keys=False, allow_unicode=True).rstrip()
    return Command(f"spine {step.command} --config {name} --out {out}", f"{step.summary}; {name} holds", file)


def _config(command: str, values: Mapping[str, JsonValue]) -> Config | None:
    kind = _CONFIGS.get(command)
    if kind is None or not values:
        return None
    try:
        return kind.model_validate(dict(values))
    except ValidationError:  # another version of spine wrote it; its file says what it says
        return None
