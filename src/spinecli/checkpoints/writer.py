"""Writing a checkpoint shard by shard, never holding more than one shard in memory."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import require_space
from spinecli.artifacts.whole_file import whole_file
from spinecli.checkpoints.family import families
from spinecli.checkpoints.skeleton import modelling_source
from spinecli.checkpoints.source import TOKENIZER_PATTERNS
from spinecli.checkpoints.tensors import INDEX_FILE, SINGLE_FILE, TensorSource, read_json_list, read_json_object
from spinecli.errors import UnsafeFileError

_TEMPLATES = "additional_chat_templates"
_MODULES = "modules.json"
_OF_TOKENIZERS = (*TOKENIZER_PATTERNS, f"{_TEMPLATES}/*.jinja")
_PATTERNS = (
    "generation_config.json",
    "*processor_config.json",
    _MODULES,
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def companions(directory: Path) -> list[PurePosixPath]:
    """The companion files in a checkpoint's directory, relative to it, sorted.

    Raises: UnsafeFileError if a file names one outside the directory, DamagedCheckpointError if it is not JSON.
    """
    others = (path for pattern in _PATTERNS for path in directory.glob(pattern))
    return sorted({*tokenizer_files(directory), *_relative(directory, (*others, *_sentence_modules(directory)))})


def tokenizer_files(directory: Path) -> list[PurePosixPath]:
    """Those of the companions that are the tokenizer's. Raises as `companions` does."""
    patterns = (path for pattern in _OF_TOKENIZERS for path in directory.glob(pattern))
    return _relative(directory, (*patterns, *_code(directory)))


def _relative(directory: Path, paths: Iterable[Path]) -> list[PurePosixPath]:
    files = {path for path in paths if path.is_file()}
    return sorted(PurePosixPath(path.relative_to(directory).as_posix()) for path in files)


def is_companion(directory: Path, path: Path) -> bool:
    """Whether a file or folder of a written checkpoint's directory is one of its companions, or holds some."""
    relative = path.relative_to(directory).as_posix()
    return any(relative in (str(each), each.parts[0]) for each in companions(directory))


def _code(directory: Path) -> Iterator[Path]:
    """The modules that the tokenizer's configuration names, and those that they import from beside them."""
    file = directory / "tokenizer_config.json"
    named = read_json_object(file).get("auto_map") if file.is_file() else None
    for reference in _references(named):
        # owner/name--module.Class is fetched from elsewhere by whoever loads it
        module = "" if "--" in reference else reference.rpartition(".")[0]
        if module and (path := _inside(directory, f"{module}.py", file)).is_file():
            yield path
            yield from (Path(imported) for imported in get_relative_import_files(path))


def _references(named: Any) -> Iterator[str]:
    """The classes in an `auto_map`: names, or lists of a slow and a fast one, either of which may be null."""
    for value in named.values() if isinstance(named, dict) else ():
        yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))


def _sentence_modules(directory: Path) -> Iterator[Path]:
    """What lies in the folders of a sentence-transformers model: pooling, dense layers, normalisation."""
    file = directory / _MODULES
    if not file.is_file():
        return
    for module in read_json_list(file):
        name = module.get("path") if isinstance(module, dict) else None
        if name:
            yield from (path for path in _inside(directory, str(name), file).rglob("*"))


def _inside(directory: Path, name: str, file: Path) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UnsafeFileError(f"{file} names {name}, outside the checkpoint; do not use it.")
    return directory / path


SHARD_BYTES = 512 << 20
_log = logging.getLogger(__name__)


def plan_shards(
    groups: Sequence[Mapping[str, TensorSource]], shard_bytes: int = SHARD_BYTES
) -> list[dict[str, TensorSource]]:
    """Pack groups into shards of at most `shard_bytes`; a group larger than that is split by tensors."""
    shards: list[dict[str, TensorSource]] = [{}]
    filled = 0
    for group in groups:
        size = sum(tensor.bytes for tensor in group.values())
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        for name, tensor in group.items():
            if filled and filled + tensor.bytes > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = tensor
            filled += tensor.bytes
    return shards


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    groups: Sequence[Mapping[str, TensorSource]],
    companions_of: Path,
    context: RunContext | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer_of: Path | None = None,
) -> None:
    """Write config.json, the shards and their index, and copy the companion files of `companions_of`.

    Code that config.json names for the model is not taken along: it was written for the model as it was, and the
    families that spine knows need none. A family that transformers does not know gets its modelling file beside the
    weights. Tensors get the names by which files of the family call them.

    Args:
        tokenizer_of: where the tokenizer's files come from, if not from `companions_of`.

    Shards that an earlier, killed run finished are kept: a shard appears under its name only when it is whole.

    Raises: NoSpaceError.
    """
    context, family = context or RunContext(), families().get(config.get("model_type", ""))
    if family and family.stored_names:
        groups = [{family.stored_name(name): tensor for name, tensor in group.items()} for group in groups]
    shards = plan_shards(groups, shard_bytes)
    names = _shard_names(len(shards))
    missing = [shard for shard, name in zip(shards, names, strict=True) if not (directory / name).is_file()]
    require_space(directory, sum(tensor.bytes for shard in missing for tensor in shard.values()))
    for done, (name, shard) in enumerate(zip(names, shards, strict=True)):
        if not (directory / name).is_file():
            _write_shard(directory / name, shard)
        context.progress("writing", done + 1, len(shards))
    if len(shards) > 1:
        _write_json(directory / INDEX_FILE, _index(names, shards))
    if source := modelling_source(config):
        shutil.copyfile(source, directory / source.name)
    elif "auto_map" in config:
        _log.warning(
            f"{companions_of / 'config.json'} names code of its own under auto_map; the result does without, because "
            f"transformers has {config.get('model_type')} itself."
        )
        config = {key: value for key, value in config.items() if key != "auto_map"}
    _write_json(directory / "config.json", config)
    copied = dict.fromkeys(companions(companions_of), companions_of)
    if tokenizer_of is not None and tokenizer_of != companions_of:
        copied = {name: place for name, place in copied.items() if name not in tokenizer_files(companions_of)}
        copied |= dict.fromkeys(tokenizer_files(tokenizer_of), tokenizer_of)
    for companion, place in copied.items():
        (directory / companion).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place / companion, directory / companion)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(path: Path, shard: Mapping[str, TensorSource]) -> None:
    values = {name: tensor.read() for name, tensor in shard.items()}
    with whole_file(path) as part:
        save_file(values, part, metadata={"format": "pt"})


def _index(names: Sequence[str], shards: Sequence[Mapping[str, TensorSource]]) -> dict[str, Any]:
    weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.bytes for shard in shards for tensor in shard.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
