"""The models of a benchmark: checkpoints, which both engines can run, and GGUF files, which llama.cpp runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spinecli.benching.gguf_file import SUFFIX, GgufFile, read_gguf
from spinecli.benching.results import ModelFacts
from spinecli.errors import OptionError
from spinecli.evaluation.models import Subject, open_subjects, unique_labels, weights_of


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
            "nothing compares; name models of one kind."
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
