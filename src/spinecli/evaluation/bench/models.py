"""The models of a benchmark: checkpoints, which both engines can run, and GGUF files, which llama.cpp runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import require_space
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.errors import MissingPackageError, OptionError
from spinecli.evaluation.bench.gguf_file import INSTALL_GGUF, SUFFIX, GgufFile, read_gguf
from spinecli.evaluation.bench.results import ModelFacts
from spinecli.evaluation.models import Subject, open_subjects, unique_labels, weights_of
from spinecli.exports.config import Quantization

if TYPE_CHECKING:
    from spinecli.exports.gguf_file import GgufModel


@dataclass(frozen=True, eq=False)
class Model:
    """One model under benchmark."""

    label: str
    """Short and unique among the models of a benchmark."""
    reference: str
    """As the user named it."""
    source: Subject | GgufFile

    @property
    def subject(self) -> Subject | None:
        """The checkpoint, if it is one."""
        return self.source if isinstance(self.source, Subject) else None

    @property
    def classifies(self) -> bool:
        """Whether it is a classifier; else it is a causal language model."""
        return isinstance(self.source, Subject) and self.source.classifies

    @property
    def positions(self) -> int | None:
        """Longest sequence that it was made for; None if it does not say."""
        return self.source.positions

    def facts(self) -> ModelFacts:
        """Counts from the header."""
        counts = weights_of(self.source) if isinstance(self.source, Subject) else self.source
        return ModelFacts(
            label=self.label,
            reference=self.reference,
            parameters=counts.parameters,
            block_parameters=counts.block_parameters,
        )


def open_models(references: Sequence[str]) -> list[Model]:
    """Open everything by its header; no weights are read.

    Raises: OptionError if there are classifiers among language models, and what `open_subjects` and `read_gguf` raise.
    """
    files = {index: read_gguf(Path(name).expanduser()) for index, name in enumerate(references) if is_gguf(name)}
    checkpoints = [index for index in range(len(references)) if index not in files]
    subjects = open_subjects([(references[index], None) for index in checkpoints])
    sources: dict[int, Subject | GgufFile] = {**files, **dict(zip(checkpoints, subjects, strict=True))}
    ordered = [sources[index] for index in range(len(references))]
    classifier = next((subject for subject in subjects if subject.classifies), None)
    if classifier and files:
        raise OptionError(
            f"{classifier.label} is a classifier and {next(iter(files.values())).path} is a language model, which "
            "cannot be compared; name models of one kind."
        )
    names = [source.label if isinstance(source, Subject) else source.path.name for source in ordered]
    labels = unique_labels(names, references)
    return [
        Model(label, reference, replace(source, label=label) if isinstance(source, Subject) else source)
        for label, reference, source in zip(labels, references, ordered, strict=True)
    ]


def is_gguf(reference: str) -> bool:
    """Whether an argument names a GGUF file; a directory may be called anything."""
    return reference.lower().endswith(SUFFIX) and not Path(reference).expanduser().is_dir()


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
    from spinecli.exports.gguf_model import gguf_model

    checkpoint = model.source.checkpoint
    planned, _ = gguf_model(checkpoint, tokenizer_of(checkpoint), quantize)
    return Convertible(model, planned)


@contextmanager
def gguf_files(models: Sequence[Convertible], context: RunContext) -> Iterator[list[GgufFile]]:
    """A file of every model, in their order; those that are written here are gone at the end.

    Raises: NoSpaceError, UnexportableError, and what reading a checkpoint raises.
    """
    with TemporaryDirectory(prefix="spine-bench-") as folder:
        missing = [each.planned for each in models if not isinstance(each.planned, GgufFile)]
        require_space(Path(folder), sum(planned.bytes for planned in missing))
        files = []
        for index, each in enumerate(models):
            files.append(_written(each.planned, Path(folder) / f"{index}.gguf"))
            context.progress("writing GGUF files", index + 1, len(models))
        yield files


def _written(planned: GgufModel | GgufFile, path: Path) -> GgufFile:
    if isinstance(planned, GgufFile):
        return planned
    from spinecli.exports.gguf_file import write_gguf

    write_gguf(path, planned)
    return read_gguf(path)
