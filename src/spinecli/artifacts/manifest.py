"""`spine.json`: what a directory is, where it came from, and the sums of its files.

The manifest is written last, when every file that it names is in place.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from spinecli import __version__
from spinecli.artifacts.record import Record
from spinecli.errors import DamagedArtifactError, ForeignArtifactError, MissingPathError

_CHUNK_BYTES = 4 << 20


def sha256_file(path: Path) -> str:
    """The SHA-256 sum of a file's bytes, in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def sha256_value(value: JsonValue) -> str:
    """The SHA-256 sum of a JSON value in its canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


MANIFEST_NAME = "spine.json"
FORMAT_VERSION = 1

ArtifactKind = Literal[
    "pruned-checkpoint",
    "tuned-checkpoint",
    "healed-checkpoint",
    "evaluation",
    "benchmark",
    "sweep",
    "lora-plan",
    "federated-adapter",
    "joined-checkpoint",
]


class FileRecord(Record):
    """One file of an artifact."""

    sha256: str
    bytes: int


class Source(Record):
    """One input of a step: a checkpoint, a text, an artifact."""

    reference: str
    """The path, hub id or builtin name as the user typed it."""
    files: dict[str, FileRecord]

    @property
    def digest(self) -> str:
        """One sum over the names and sums of all files, independent of where they lie."""
        return sha256_value({name: record.sha256 for name, record in self.files.items()})


class Step(Record):
    """One ancestor of an artifact, oldest first in `Manifest.lineage`."""

    kind: str
    command: str
    reference: str
    digest: str
    summary: str
    config: dict[str, JsonValue] = Field(default={})
    """What the command was asked for; empty of an input that no command wrote."""


class Measured(Record):
    """What the run took. Differs from run to run and is outside the digest."""

    started: str
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    versions: dict[str, str]


class Manifest(Record):
    """The whole of `spine.json`."""

    spine_format: int = FORMAT_VERSION
    kind: ArtifactKind
    command: str
    config: dict[str, JsonValue] = Field(default={})
    """What the command was asked for, in the form of `--config`; paths as the user typed them."""
    parameters: dict[str, JsonValue]
    """What of it decides the result, with every default that depended on the inputs resolved."""
    seed: int
    inputs: dict[str, Source]
    outputs: dict[str, FileRecord]
    lineage: tuple[Step, ...] = Field(default=())
    summary: str
    report: dict[str, JsonValue]
    measured: Measured
    digest: str = ""

    def sealed(self) -> Manifest:
        """A copy that carries its own digest."""
        return self.model_copy(update={"digest": self.computed_digest()})

    def computed_digest(self) -> str:
        """The sum over everything that the same command must reproduce."""
        return sha256_value(
            {
                "format": self.spine_format,
                "kind": self.kind,
                "command": self.command,
                "parameters": self.parameters,
                "seed": self.seed,
                "inputs": {name: source.digest for name, source in self.inputs.items()},
                "outputs": {name: record.sha256 for name, record in self.outputs.items()},
                "report": self.report,
            }
        )

    def as_step(self, reference: str) -> Step:
        """The artifact as an ancestor of the next one, which knew it by `reference`."""
        return Step(
            kind=self.kind,
            command=self.command,
            reference=reference,
            digest=self.digest,
            summary=self.summary,
            config=self.config,
        )

    def write(self, directory: Path) -> None:
        """Write `spine.json` into `directory`."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest of `directory`.

    Raises: MissingPathError, ForeignArtifactError (no spine.json, or of another format), DamagedArtifactError.
    """
    if not directory.is_dir():
        raise MissingPathError(f"{directory} is not a directory; name one that a spine command wrote.")
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ForeignArtifactError(f"{directory} has no {MANIFEST_NAME}, so no spine command wrote it.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"{path} is not readable JSON; write the artifact again.") from error
    version = raw.get("spine_format") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ForeignArtifactError(
            f"{path} has format {version!r}, this spine reads format {FORMAT_VERSION}; write the artifact again."
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DamagedArtifactError(f"{path} is damaged at {field!r}; write the artifact again.") from error
    for name in manifest.outputs:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedArtifactError(f"{path} names the file {name!r} outside its directory; do not use it.")
    return manifest


def expect_kind(directory: Path, wanted: tuple[ArtifactKind, ...], way_out: str) -> Manifest:
    """The manifest of `directory` if its kind is one of `wanted`, else a ForeignArtifactError ending in `way_out`."""
    manifest = read_manifest(directory)
    if manifest.kind not in wanted:
        raise ForeignArtifactError(f"{directory} is a {manifest.kind}, not a {' or '.join(wanted)}; {way_out}.")
    return manifest


def record_files(directory: Path) -> dict[str, FileRecord]:
    """Sizes and sums of every file below `directory`, by relative name.

    Its manifest is not among them, nor is that of an artifact inside it, which tells how long its own making took.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(directory).as_posix(): record_file(path) for path in files}


def record_file(path: Path) -> FileRecord:
    """Size and sum of one file."""
    return FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size)


def damaged_files(directory: Path, manifest: Manifest) -> dict[str, str]:
    """What differs from the manifest: file name -> "missing", "changed", or "not listed"."""
    found: dict[str, str] = {}
    for name, record in manifest.outputs.items():
        path = directory / name
        if not path.is_file():
            found[name] = "missing"
        elif path.stat().st_size != record.bytes or sha256_file(path) != record.sha256:
            found[name] = "changed"
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and path.name != MANIFEST_NAME and name not in manifest.outputs:
            found[name] = "not listed"
    if manifest.computed_digest() != manifest.digest:
        found[MANIFEST_NAME] = "changed"
    return found


def current_versions() -> dict[str, str]:
    """Versions of this package, Python, and the packages that decide the numbers."""
    packages = ("torch", "transformers", "safetensors")
    return {
        "spine": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


DENSE_KIND = "dense-checkpoint"


def lineage_behind(directory: Path, source: Source) -> tuple[Step, ...]:
    """The steps that led to an input, oldest first, the input itself last.

    Raises: DamagedArtifactError if the input has a manifest and its files are not those that the manifest lists.
    """
    if not (directory / MANIFEST_NAME).is_file():
        return (Step(kind=DENSE_KIND, command="", reference=source.reference, digest=source.digest, summary=""),)
    manifest = read_manifest(directory)
    for name, record in source.files.items():
        listed = manifest.outputs.get(name)
        if listed is None or listed.sha256 != record.sha256:
            raise DamagedArtifactError(
                f"{directory / name} is not the file that spine wrote; write {directory} again, or remove its "
                f"{MANIFEST_NAME} to use it as a checkpoint of your own."
            )
    return (*manifest.lineage, manifest.as_step(source.reference))
