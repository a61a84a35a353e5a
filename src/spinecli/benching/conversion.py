"""From the models of a benchmark to the GGUF files that llama.cpp opens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from spinecli.artifacts.directory import require_space
from spinecli.benching.gguf_file import INSTALL_GGUF, GgufFile, read_gguf
from spinecli.benching.models import Model
from spinecli.benching.settings import Quantization
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.errors import MissingPackageError
from spinecli.progress import Progress

if TYPE_CHECKING:
    from spinecli.export.gguf_file import GgufModel


@dataclass(frozen=True)
class Convertible:
    """A model that llama.cpp can run."""

    model: Model
    planned: GgufModel | GgufFile
    """The file that it is, or is going to be."""


def convertible(model: Model, quantize: Quantization) -> Convertible:
    """Check that a model can be written as GGUF, if it is none already; no weight is read.

    Raises: MissingPackageError, UnexportableError, TokenizerError.
    """
    if isinstance(model.source, GgufFile):
        return Convertible(model, model.source)
    if find_spec("gguf") is None:
        raise MissingPackageError(
            f"llama.cpp takes {model.label} as GGUF, which needs the package gguf; {INSTALL_GGUF}."
        )
    from spinecli.export.gguf_model import gguf_model
    from spinecli.export.storage import Quantization as Storage

    checkpoint = model.source.checkpoint
    planned, _ = gguf_model(checkpoint, tokenizer_of(checkpoint), Storage(quantize))
    return Convertible(model, planned)


@contextmanager
def gguf_files(models: Sequence[Convertible], progress: Progress) -> Iterator[list[GgufFile]]:
    """A file of every model, in their order; those that are written here are gone at the end.

    Raises: NoSpaceError, UnexportableError, and what reading a checkpoint raises.
    """
    with TemporaryDirectory(prefix="spine-bench-") as folder:
        missing = [each.planned for each in models if not isinstance(each.planned, GgufFile)]
        require_space(Path(folder), sum(planned.bytes for planned in missing))
        files = []
        for index, each in enumerate(models):
            files.append(_written(each.planned, Path(folder) / f"{index}.gguf"))
            progress("writing GGUF files", index + 1, len(models))
        yield files


def _written(planned: GgufModel | GgufFile, path: Path) -> GgufFile:
    if isinstance(planned, GgufFile):
        return planned
    from spinecli.export.gguf_file import write_gguf

    write_gguf(path, planned)
    return read_gguf(path)
