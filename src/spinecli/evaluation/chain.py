"""The commands that led to a result, in the form in which a person types them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import yaml
from pydantic import JsonValue, ValidationError

from spinecli.artifacts.manifest import DENSE_KIND, Step
from spinecli.config import Config, ConfigField, in_words
from spinecli.evaluation.page.page import Command
from spinecli.pruning.config import PruneConfig, TuneConfig

# Commands whose results are measured here and whose flags are known here. Others are told by their file for --config.
_CONFIGS: Mapping[str, type[Config]] = {"prune": PruneConfig, "tune": TuneConfig}


def commands_behind(steps: Sequence[Step]) -> tuple[Command, ...]:
    """The commands that made the inputs of a run, oldest first, each once."""
    made = [step for step in steps if step.kind != DENSE_KIND and step.command]
    return tuple(dict.fromkeys(_of_step(step) for step in made))


def command_line(command: str, config: Config, out: str | None = None) -> Command:
    """The command that was asked for by a config: what differs from the defaults, and where it wrote."""
    arguments, flags = [], []
    for found in type(config).fields():
        value = _value(config, found)
        if value is None:
            continue
        if found.option.argument:
            arguments += [in_words(each) for each in (value if isinstance(value, tuple) else (value,))]
        elif value != found.info.get_default(call_default_factory=True, validated_data={}):
            flags += _flag(found.flag, value, repeated=found.kind == tuple[str, ...])
    place = ["--out", out or command]
    return Command(shlex.join(["spine", command, *arguments, *flags, *place]))


def _of_step(step: Step) -> Command:
    config = _config(step.command, step.config)
    if config is not None:
        return Command(command_line(step.command, config, step.reference).line, step.summary)
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


def _value(config: Config, found: ConfigField) -> Any:
    """The value of a field; None if it, or the part of the config that it stands in, was not asked for."""
    value: Any = config
    for name in found.path:
        value = None if value is None else getattr(value, name)
    return value


def _flag(name: str, value: Any, *, repeated: bool) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if repeated:
        return [word for each in value for word in (name, str(each))]
    return [name, str(value.value) if isinstance(value, Enum) else in_words(value)]
