"""One run of a command, from its inputs to the directory that it publishes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import JsonValue

from spinecli.artifacts.directory import (
    OutputOptions,
    WorkDirectory,
    fingerprint_of,
    finished_run,
    work_directory,
)
from spinecli.artifacts.manifest import ArtifactKind, Manifest, Measured, Source, Step, record_files
from spinecli.config import Config


@dataclass(frozen=True)
class Run:
    """What a command makes, and from what: all that decides its result."""

    kind: ArtifactKind
    command: str
    config: Config
    parameters: dict[str, JsonValue]
    seed: int
    inputs: dict[str, Source]
    lineage: tuple[Step, ...]

    @property
    def fingerprint(self) -> JsonValue:
        """Equal for two runs of which one may continue the other."""
        return fingerprint_of(self.command, self.parameters, self.seed, self.inputs)

    def finished(self, output: OutputOptions) -> Manifest | None:
        """The manifest of an output that this very run has already written, if `--resume` finds one."""
        return finished_run(output, self.fingerprint)

    @contextmanager
    def working(self, output: OutputOptions) -> Iterator[WorkDirectory]:
        """The run's work directory, new or resumed.

        Raises: OutputExistsError, OutputNotWritableError, UnfinishedRunError, MissingPathError, NoSpaceError.
        """
        with work_directory(output, self.fingerprint) as work:
            yield work

    def publish(
        self, work: WorkDirectory, summary: str, report: Mapping[str, JsonValue], measured: Measured
    ) -> Manifest:
        """Put the work's files in their final place under a manifest, which is returned."""
        manifest = Manifest(
            kind=self.kind,
            command=self.command,
            config=self.config.model_dump(mode="json"),
            parameters=self.parameters,
            seed=self.seed,
            inputs=self.inputs,
            outputs=record_files(work.files),
            lineage=self.lineage,
            summary=summary,
            report=dict(report),
            measured=measured,
        )
        work.publish(manifest)
        return manifest.sealed()
