"""What a command is asked for: one frozen model each, whose fields hold everything that is said of an option.

A field states its type, default and bounds, and by an `Option` what a person reads of it. Flags, their help, files for
`--config`, `spine.json` and the tables of the documentation are all made from that. Fields that belong together are a
model of their own, which is the same class wherever the same is asked.
"""

from __future__ import annotations

import shlex
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from spinecli.errors import MissingPathError, OptionError, reason_of

_Kind = TypeVar("_Kind", bound="Config")


@dataclass(frozen=True)
class Option:
    """What a person reads of a field, on the command line and in the documentation."""

    help: str
    name: str = ""
    """The flag without its dashes; empty: the field's name."""
    default: str = ""
    """The default in words, where the field's own says nothing: what None leads to."""
    panel: str = ""
    """The part of the help that it stands in; empty: that of the model around it."""
    argument: bool = False
    """On the command line it stands without a flag."""
    decides: bool = True
    """Whether the result depends on the value itself. That of a path depends on what lies there, which is an input."""
    renamed: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Of a field that holds a model: flags of the model's fields that have another name here, by field."""


_BARE = Option("")


@dataclass(frozen=True)
class ConfigField:
    """One field of a config or of a model inside it, found by its path."""

    path: tuple[str, ...]
    option: Option
    info: FieldInfo
    panel: str
    required: bool
    """Whether it must be given: it has no default, nor has a model around it."""

    @property
    def name(self) -> str:
        """As a keyword in Python: `batch_size`."""
        return (self.option.name or self.path[-1]).replace("-", "_")

    @property
    def flag(self) -> str:
        """As a person names it on the command line: `--batch-size`, or `MODEL` of an argument."""
        return self.name.upper() if self.option.argument else f"--{self.name.replace('_', '-')}"

    @property
    def default(self) -> Any:
        """The value if none is given."""
        return self.info.get_default(call_default_factory=True, validated_data={})

    @property
    def default_in_words(self) -> str:
        """The default as a person reads it; empty if there is none, or if it only means that nothing is asked for."""
        if self.info.is_required() or (self.default in (None, ()) and not self.option.default):
            return ""
        return self.option.default or in_words(self.default)

    @property
    def kind(self) -> Any:
        """The field's type, without `None`."""
        return without_none(self.info.annotation)

    @property
    def repeated(self) -> bool:
        """Whether the flag may be given several times, a value each."""
        return get_origin(self.kind) is tuple and get_args(self.kind) == (str, ...)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a field that has few, by name."""
        if get_origin(self.kind) is Literal:
            return tuple(str(value) for value in get_args(self.kind))
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return tuple(str(value.value) for value in self.kind)
        return ()


class Config(BaseModel):
    """The base of every command's config. Unknown fields are refused, and nothing changes after it was made."""

    # built when they are first used, because `spine --help` loads all of them
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @classmethod
    def fields(cls) -> tuple[ConfigField, ...]:
        """All fields, those of models inside it in their place."""
        return tuple(_fields_of(cls))

    def value_of(self, found: ConfigField) -> Any:
        """The value of one of `fields`; None where the model around it is None."""
        value: Any = self
        for name in found.path:
            value = None if value is None else getattr(value, name)
        return value

    def parameters(self) -> dict[str, JsonValue]:
        """The values that decide the result, by name, for `spine.json`."""
        plain = self.model_dump(mode="json")
        return {found.name: _at(plain, found.path) for found in type(self).fields() if found.option.decides}

    def arguments(self) -> list[str]:
        """The words of a command line that asks for the same: what differs from the defaults."""
        words: list[str] = []
        for found in type(self).fields():
            value = self.value_of(found)
            if found.option.argument:
                words[:0] = map(in_words, value) if found.repeated else [in_words(value)]
            elif value is not None and (found.required or value != found.default):
                words += _flags(found, value)
        return words

    def command_line(self, command: str, out: str) -> str:
        """What a person would type to ask for the same, written to `out`."""
        return shlex.join(["spine", command, *self.arguments(), "--out", out])

    def as_yaml(self) -> str:
        """A file for `--config` that asks for the same."""
        import yaml

        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


# Options that mean the same in every command.
Model = Annotated[
    str, Option("Checkpoint to read: a directory, a hub id, or builtin:tiny.", argument=True, decides=False)
]
Seed = Annotated[int, Field(ge=0), Option("Seed for everything that is drawn at random.", decides=False)]
"""Recorded beside the parameters."""
Device = Annotated[str, Option("Device to compute on: cpu, cuda, cuda:1 or mps.", decides=False)]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    Option("Precision of the computation; the precision of stored weights does not change."),
]
Sparsity = Annotated[
    float,
    Field(gt=0, lt=1),
    Option("Share of the block parameters to remove, between 0 and 1; embeddings and head do not count."),
]
RoundTo = Annotated[
    int,
    Field(ge=1),
    Option("Keep a multiple of this many channels, unless all are kept; use 32 or 256 for quantised GGUF."),
]


def read_config(kind: type[_Kind], file: Path | None, given: Mapping[str, Any]) -> _Kind:
    """A config from a file, in which what stands in `given` takes the place of what the file says.

    Args:
        given: values by the fields' names, those of models inside it too.

    Raises: MissingPathError, OptionError that names the flag of a wrong value, or its place in the file.
    """
    layers = [given] if file is None else [_read_yaml(file), given]
    return _build(kind, layers, lambda found: found.flag, "" if file is None else f" ({file})")


def make_config(kind: type[_Kind], config: Any, given: Mapping[str, Any]) -> _Kind:
    """A config as Python code asks for it: one that is ready, or the value of its first field; and others by name.

    Raises: OptionError that names the field of a wrong value.
    """
    if isinstance(config, kind):
        return config if not given else _build(kind, [config.model_dump(), given], lambda found: found.name)
    first = kind.fields()[0].name
    if isinstance(config, Config):
        raise OptionError(f"This takes a {kind.__name__}, not a {type(config).__name__}.")
    return _build(kind, [{first: config, **given}], lambda found: found.name)


def without_none(annotation: Any) -> Any:
    """The type of a field that may be None."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007
    return annotation


def in_words(value: Any) -> str:
    """A value as a person types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (tuple, list)):
        return ",".join(map(in_words, value)) or "none"
    return str(value)


def _flags(found: ConfigField, value: Any) -> list[str]:
    if found.kind is bool:
        return [found.flag if value else f"--no-{found.flag[2:]}"]
    if found.repeated:
        return [word for each in value for word in (found.flag, in_words(each))]
    return [found.flag, in_words(value)]


def _fields_of(
    kind: type[BaseModel], path: tuple[str, ...] = (), around: Option = _BARE, required: bool = True
) -> Iterator[ConfigField]:
    for name, info in kind.model_fields.items():
        # the last one: a field may say it in its own words although its type brings some
        option = next((each for each in reversed(info.metadata) if isinstance(each, Option)), None)
        inner, needed = without_none(info.annotation), required and info.is_required()
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _fields_of(inner, (*path, name), option or around, needed)
        elif option is not None:
            option = replace(option, name=around.renamed.get(name, option.name))
            yield ConfigField((*path, name), option, info, option.panel or around.panel, needed)


def _at(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = None if values is None else values[name]
    return values


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingPathError(f"{file} does not exist; name a YAML file with --config.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{file} cannot be read as YAML ({reason_of(error)}); fix it.") from error
    if not isinstance(values, dict):
        raise OptionError(f"{file} is not a list of options and values; --print-config shows what one looks like.")
    return values


def _build(
    kind: type[_Kind],
    layers: Sequence[Mapping[str, Any]],
    named: Callable[[ConfigField], str],
    where: str = "",
) -> _Kind:
    """A config from values by the names of fields, or of models inside it; those of later layers count."""
    by_name = {found.name: found for found in kind.fields()}
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if isinstance(value, BaseModel) and name in kind.model_fields:
                merged[name] = value.model_dump()
            elif isinstance(value, Mapping) and name in kind.model_fields:
                merged[name] = {**(merged.get(name) or {}), **_copied(value)}
            elif name in by_name and not (value is None and name in kind.model_fields):
                *outer, last = by_name[name].path
                place = merged
                for step in outer:
                    if place.get(step) is None:
                        place[step] = {}
                    place = place[step]
                place[last] = value
            elif name in kind.model_fields:
                merged[name] = value
            else:
                raise OptionError(_unknown(name, by_name) + where)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        told = error.errors()[0]
        wrong = tuple(str(part) for part in told["loc"])
        typed = [by_name[name].path for name in layers[-1] if name in by_name]
        read = wrong and not any(path == wrong[: len(path)] for path in typed)
        raise OptionError(_sentence(kind, told, named) + (where if read else "")) from None


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _copied(value) if isinstance(value, dict) else value for name, value in values.items()}


def _unknown(name: str, known: Mapping[str, ConfigField]) -> str:
    near = get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    return f"There is no option {name}; {meant}"


def _sentence(kind: type[Config], error: ErrorDetails, named: Callable[[ConfigField], str]) -> str:
    """What is wrong with one value, with the name of its flag or field."""
    path = tuple(str(part) for part in error["loc"])
    found = next((each for each in kind.fields() if each.path == path[: len(each.path)]), None)
    if error["type"] == "missing" and found is None:  # a whole model, of which one field has to be given
        found = next(each for each in kind.fields() if each.required and each.path[: len(path)] == path)
    if error["type"] == "extra_forbidden":
        inside = {each.path[len(path) - 1]: each for each in kind.fields() if each.path[: len(path) - 1] == path[:-1]}
        return _unknown(".".join(path), {".".join([*path[:-1], name]): each for name, each in inside.items()})
    if found is None and error["type"] == "value_error":  # of options that do not go together: a whole sentence
        return str(error["ctx"]["error"])
    if found is None:
        return f"{'.'.join(path) or 'The options'}: {error['msg']}."
    name, value = named(found), error["input"]
    if error["type"] == "missing":
        beside = [each for each in kind.fields() if each.path[:-1] == path[:-1] and each.path[-1] in value]
        if beside and not found.required:
            return f"{named(beside[0])} belongs to {name}, which is not given; add it."
        return f"{name} is missing: {found.option.help}"
    if error["type"] == "value_error":
        return f"{name} {error['ctx']['error']}"
    # the command line gives numbers as they were typed
    shown = str(value) if isinstance(value, (int, float)) or _is_number(value) else repr(value)
    return f"{name} must be {_demand(found, error['type'])}, not {shown}."


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _demand(found: ConfigField, error: str) -> str:
    """What a value has to be: by its bounds, or by its type too if it has another."""
    if found.choices:
        return f"one of {', '.join(found.choices)}"
    limits = ((word, getattr(each, key, None)) for key, word in _BOUNDS.items() for each in found.info.metadata)
    bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
    kind = _KINDS.get(found.kind, "a list")
    if error.endswith(("_parsing", "_type", "_from_float")) or not bounds:
        return f"{kind}, {bounds}" if bounds else kind
    return bounds
