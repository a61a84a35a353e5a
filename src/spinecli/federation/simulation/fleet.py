"""A fleet: which devices there are, how fast they compute and communicate, and how they vary.

A fleet is a TOML file, read by `load_fleet`, or a built-in one scaled to a number of devices. The file's reference is
docs/fleets.md. Nothing here imports torch, so that a command's help can list the built-in fleets.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from spinecli.artifacts.manifest import FileRecord, Source
from spinecli.errors import FleetError, MissingPathError
from spinecli.federation.bounds import ClassName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_DEVICES = 100_000
DEFAULT_SERVER_FLOPS = 1e13
"""Effective FLOP/s of the server where a fleet does not say; only split training lets the server compute."""
_BUILT_IN = re.compile(r"^([a-z]+)-([0-9]{1,9})$")


def _listed(value: object) -> tuple[Any, ...]:
    """A single number as a list of one; pydantic's strict tuples refuse TOML's lists."""
    return tuple(value) if isinstance(value, list) else (value,)


def _band(value: object) -> object:
    """A single number as the interval from itself to itself; an interval must not fall."""
    band = tuple(value) if isinstance(value, list) else (value, value)
    if len(band) != 2:
        raise ValueError("should be one number or [low, high]")
    if all(isinstance(end, int | float) for end in band) and band[0] > band[1]:
        raise ValueError("should have its lower end first")
    return band


_Speed = Annotated[float, Field(ge=1, le=1e18)]
_Rate = Annotated[float, Field(ge=1e-6, le=1e6)]
_Band = Annotated[tuple[_Rate, _Rate], BeforeValidator(_band)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DeviceClass(_Data):
    """Devices of one kind; each draws its own mode, rates, jitter and failures (see `conditions`)."""

    name: ClassName
    count: int = Field(ge=1, le=MOST_DEVICES)
    modes: Annotated[tuple[_Speed, ...], BeforeValidator(_listed), Field(min_length=1)]
    """Effective FLOP/s of training, one value per power mode."""
    mode_rounds: int = Field(default=20, ge=0)
    """Rounds between two draws of mode and rates; 0: drawn once."""
    up_mbps: _Band
    """Lowest and highest rate from device to server, in 10^6 bits per second."""
    down_mbps: _Band
    memory_gb: float = Field(gt=0, le=1e6)
    """Memory that training may take, in 10^9 bytes."""
    jitter: float = Field(default=0.0, ge=0, le=3)
    """Standard deviation of the logarithm of the factor on compute time, drawn each round."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance per round that the device fails in it."""
    latency_ms: float = Field(default=0.0, ge=0, le=1e9)
    """Added to every message, either way."""

    @property
    def memory_bytes(self) -> int:
        """Memory that training may take."""
        return int(self.memory_gb * 1e9)


class _FleetFile(_Data):
    name: str = Field(min_length=1)
    server_flops: _Speed = DEFAULT_SERVER_FLOPS
    classes: Annotated[tuple[DeviceClass, ...], BeforeValidator(_listed), Field(alias="class", min_length=1)]


@dataclass(frozen=True)
class DeviceSpec:
    """One device of a fleet."""

    name: str
    """Its class and its number in it, for example `tx2-07`; stays the same when the fleet grows."""
    device_class: DeviceClass


@dataclass(frozen=True)
class Fleet:
    """Devices by class."""

    name: str
    classes: tuple[DeviceClass, ...]
    reference: str
    """As the user typed it."""
    server_flops: float = DEFAULT_SERVER_FLOPS
    """Effective FLOP/s of the server."""

    @cached_property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """All devices, class by class."""
        return tuple(
            DeviceSpec(f"{device_class.name}-{number:02d}", device_class)
            for device_class in self.classes
            for number in range(device_class.count)
        )

    def source(self) -> Source:
        """The fleet as an input of a step; its sum covers the values, not how the file writes them."""
        content = {
            "name": self.name,
            "server_flops": self.server_flops,
            "class": [device_class.model_dump(mode="json") for device_class in self.classes],
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        record = FileRecord(sha256=hashlib.sha256(text).hexdigest(), bytes=len(text))
        return Source(reference=self.reference, files={"fleet": record})


def known_fleets() -> tuple[str, ...]:
    """The built-in fleets, with N for the number of devices."""
    return tuple(f"{kind}-N" for kind in sorted(_templates()))


def load_fleet(reference: str, devices: int | None = None) -> Fleet:
    """The fleet in a .toml file, or a built-in one such as `jetson-80`.

    Args:
        devices: scale it to so many, with the shares of its classes kept.

    Raises: MissingPathError, FleetError.
    """
    if devices is not None and (found := _BUILT_IN.match(reference)):
        return load_fleet(f"{found[1]}-{devices}")
    if devices is not None:
        fleet = load_fleet(reference)
        if not 1 <= devices <= MOST_DEVICES:
            raise FleetError(f"--devices must be from 1 to {MOST_DEVICES}, not {devices}.")
        return replace(fleet, name=f"{devices} of {fleet.name}", classes=scaled(fleet.classes, devices))
    if reference.endswith(".toml"):
        path = Path(reference).expanduser()
        if not path.is_file():
            raise MissingPathError(f"{path} is not a file; name a fleet's .toml file or one of {_known()}.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FleetError(f"{path} cannot be read as UTF-8 text; name a fleet's .toml file.") from error
        return _parse(text, str(path), reference)
    found = _BUILT_IN.match(reference)
    template = _templates().get(found[1]) if found else None
    if found is None or template is None:
        raise FleetError(f"There is no fleet {reference!r}; name a fleet's .toml file or one of {_known()}.")
    total = int(found[2])
    if not 1 <= total <= MOST_DEVICES:
        raise FleetError(f"The fleet {reference} has {total} devices; take a number from 1 to {MOST_DEVICES}.")
    fleet = _parse(template.read_text(encoding="utf-8"), template.name, reference)
    return replace(fleet, name=reference, classes=scaled(fleet.classes, total))


def scaled(classes: Sequence[DeviceClass], total: int) -> tuple[DeviceClass, ...]:
    """The classes with their shares kept and `total` devices in all, by largest remainder; empty classes leave."""
    devices = sum(device_class.count for device_class in classes)
    counts = [device_class.count * total // devices for device_class in classes]
    by_remainder = sorted(range(len(classes)), key=lambda index: -(classes[index].count * total % devices))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return tuple(
        device_class.model_copy(update={"count": count})
        for device_class, count in zip(classes, counts, strict=True)
        if count
    )


def _templates() -> dict[str, Any]:
    folder = resources.files("spinecli.federation") / "fleets"
    return {file.name.removesuffix(".toml"): file for file in folder.iterdir() if file.name.endswith(".toml")}


def _known() -> str:
    return ", ".join(known_fleets())


def _parse(text: str, where: str, reference: str) -> Fleet:
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise FleetError(f"{where} is not valid TOML ({error}); correct it.") from error
    try:
        file = _FleetFile.model_validate(raw)
    except ValidationError as error:
        raise FleetError(f"{where}: {_complaint(raw, dict(error.errors()[0]))}") from error
    # Device names become file names, which some file systems compare without case.
    names = Counter(device_class.name.casefold() for device_class in file.classes)
    repeated = next((found.name for found in file.classes if names[found.name.casefold()] > 1), None)
    if repeated is not None:
        raise FleetError(f"{where} has more than one class with the name {repeated!r}; give each class its own name.")
    total = sum(device_class.count for device_class in file.classes)
    if total > MOST_DEVICES:
        raise FleetError(f"{where} has {total} devices over all classes; lower count to at most {MOST_DEVICES} in all.")
    return Fleet(file.name, file.classes, reference, file.server_flops)


def _complaint(raw: dict[str, Any], error: dict[str, Any]) -> str:
    """One sentence about pydantic's first error that names the class and the key."""
    place = error["loc"]
    owner, fields = "the fleet", _FleetFile.model_fields
    if len(place) > 1:
        table = _listed(raw["class"])[place[1]]
        name = table.get("name") if isinstance(table, dict) else None
        owner = f"class {reprlib.repr(name)}" if isinstance(name, str) else f"class number {place[1] + 1}"
        place, fields = place[2:], DeviceClass.model_fields
    if not place:
        return f"{owner} is no table of keys; write it under [[class]]."
    key = place[0]
    if error["type"] == "missing":
        return f"{owner} lacks the key {key}; add it."
    if error["type"] == "extra_forbidden":
        known = ", ".join(field.alias or name for name, field in fields.items())
        return f"{owner} has the unknown key {reprlib.repr(key)}; the keys are {known}."
    rule = re.sub(r"^(Input|Value error,|Value|Tuple|String) ?", "", error["msg"]).replace(" after validation", "")
    return f"{key} of {owner} is {reprlib.repr(error['input'])}, but {rule}."
