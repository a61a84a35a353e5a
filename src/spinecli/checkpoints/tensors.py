"""The tensors of a checkpoint: where they lie, read one by one; or made when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spinecli.errors import (
    DamagedCheckpointError,
    MissingPathError,
    NonFiniteWeightsError,
    NotACheckpointError,
    UnsafeFileError,
)


class TensorSource(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it comes."""

    @property
    def bytes(self) -> int:
        """Size on disk."""

    def read(self) -> Tensor:
        """The values."""


@dataclass(frozen=True, eq=False)
class ComputedTensor:
    """A tensor that is computed each time it is read: cut, merged with an adapter, or filled with zeros."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size on disk, once it is written."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values; ValueError if they are not what was announced."""
        value = self.make()
        if tuple(value.shape) != self.shape or value.dtype != self.dtype:
            raise ValueError(
                f"announced as {self.shape} {self.dtype}, a tensor was made as {tuple(value.shape)} {value.dtype}"
            )
        return value


def held(value: Tensor) -> ComputedTensor:
    """A tensor that is in memory."""
    return ComputedTensor(tuple(value.shape), value.dtype, lambda: value)


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What weights may be stored in, and as what they are read.
READABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
_COMPARED_ROWS = 8192
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    name: str
    shape: tuple[int, ...]
    format: str
    """safetensors' name of its dtype."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is read; KeyError if its format is none of `READABLE`."""
        return READABLE[self.format]

    @property
    def bytes(self) -> int:
        """Size in the dtype in which it is read."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values in `dtype`, as a copy that holds no file mapping.

        Raises: DamagedCheckpointError, NonFiniteWeightsError.
        """
        try:
            # One handle per tensor: pages of a long-lived mapping would count as this process' memory.
            with safe_open(self.file, framework="pt") as handle:
                value: Tensor = handle.get_tensor(self.name).to(self.dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(f"{self.file} cannot be read at {self.name}; fetch it again.") from error
        if value.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
            raise NonFiniteWeightsError(
                f"{self.name} in {self.file} holds NaN or infinite values; the checkpoint is unusable, fetch it again."
            )
        return value

    def equals(self, other: StoredTensor) -> bool:
        """Whether both hold the same values in the same shape; read in parts, up to the first difference."""
        if self.shape != other.shape:
            return False
        with safe_open(self.file, framework="pt") as own, safe_open(other.file, framework="pt") as their:
            mine, yours = own.get_slice(self.name), their.get_slice(other.name)
            parts = (slice(start, start + _COMPARED_ROWS) for start in range(0, self.shape[0], _COMPARED_ROWS))
            return all(torch.equal(mine[part].float(), yours[part].float()) for part in parts)


_Json = TypeVar("_Json", dict[str, Any], list[Any])


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; DamagedCheckpointError if it is anything else."""
    return _read_json(path, dict, "JSON object")


def read_json_list(path: Path) -> list[Any]:
    """The JSON list in `path`; DamagedCheckpointError if it is anything else."""
    return _read_json(path, list, "JSON list")


def _read_json(path: Path, kind: type[_Json], name: str) -> _Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not readable JSON; fetch the checkpoint again.") from error
    if not isinstance(value, kind):
        raise DamagedCheckpointError(f"{path} does not hold a {name}; fetch the checkpoint again.")
    return value


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `directory`, from the shards' headers alone.

    Raises: NotACheckpointError, UnsafeFileError (pickles, paths that leave the directory), DamagedCheckpointError.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():  # as transformers does, where both are there
        return _header(single)
    if not index.is_file():
        raise _no_weights(directory)
    shards = _indexed_shards(index)
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(shards.values())):
        if not (directory / file).is_file():
            raise DamagedCheckpointError(f"{index} names the shard {file}, which is missing; fetch it again.")
        headers[file] = _header(directory / file)
    for name, file in shards.items():
        if name not in headers[file]:
            raise DamagedCheckpointError(f"{index} places {name} in {file}, where it is not; fetch the shard again.")
    # of a tensor in several shards transformers takes the last, wherever the index places it
    return {name: stored for header in headers.values() for name, stored in header.items()}


def _indexed_shards(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpointError(f"{index} has no weight_map; fetch the checkpoint again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise UnsafeFileError(f"{index} places {name} in {file!r}, outside the checkpoint; do not use it.")
        if not file.endswith(".safetensors"):
            raise UnsafeFileError(f"{index} places {name} in {file!r}, which is not safetensors; convert it first.")
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    if _looks_pickled(file):
        raise UnsafeFileError(f"{file} is a pickle in disguise, not safetensors; it is not opened.")
    found = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                view = handle.get_slice(name)
                found[name] = StoredTensor(file, name, tuple(view.get_shape()), view.get_dtype())
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{file} is truncated or not safetensors; fetch it again.") from error
    return found


def _looks_pickled(file: Path) -> bool:
    with file.open("rb") as handle:
        start = handle.read(8)
    # safetensors begins with its header's length, whose low bytes may look like a pickle's first ones
    if int.from_bytes(start, "little") < file.stat().st_size:
        return False
    return start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start[:4] == b"PK\x03\x04"


def _no_weights(directory: Path) -> Exception:
    if not directory.exists():
        return MissingPathError(f"{directory} does not exist; name a checkpoint directory, a hub id or builtin:tiny.")
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickles:
        return UnsafeFileError(
            f"{directory} holds {pickles[0]}, a pickle, and no safetensors; spine never unpickles, so convert it first."
        )
    return NotACheckpointError(f"{directory} has no {SINGLE_FILE}; name a Hugging Face checkpoint directory.")
