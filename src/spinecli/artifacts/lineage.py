"""Where an artifact comes from: the chain of steps back to the dense checkpoint."""

from __future__ import annotations

from pathlib import Path

from spinecli.artifacts.manifest import MANIFEST_NAME, Source, Step, read_manifest
from spinecli.errors import DamagedArtifactError

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
