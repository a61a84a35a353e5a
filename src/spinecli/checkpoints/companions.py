"""The files beside a checkpoint's weights and configuration that a loader of its directory reads.

They travel with whatever is made of the checkpoint: the tokenizer with its chat templates and the code that it names,
generation settings, processors, what sentence-transformers adds, licences. Other weights, other formats and the model
card do not: they speak of the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from spinecli.checkpoints.source import TOKENIZER_PATTERNS
from spinecli.checkpoints.tensors import read_json_list, read_json_object
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
