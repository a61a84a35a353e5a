"""Output directories that appear whole or not at all, and the work of a killed run beside them.

parent/
  out/                  appears by one rename, when everything in it has been written and synced
  .out.spine-work/      while the run lasts, and after a kill
    run.json            which command this work belongs to (a fingerprint)
    lock                held by the process that works here
    files/              becomes out/
    state/              what `--resume` continues from
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import JsonValue
from safetensors import SafetensorError

from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, Source, read_manifest, sha256_value
from spinecli.artifacts.whole_file import whole_file
from spinecli.errors import (
    MissingPathError,
    NoSpaceError,
    OutputExistsError,
    OutputNotWritableError,
    UnfinishedRunError,
    UserError,
)


@dataclass(frozen=True)
class OutputOptions:
    """What the user allows: where to write, and what to do with what is already there.

    To resume and to overwrite means to go on where that is possible, and to start over where it is not.
    """

    path: Path
    overwrite: bool = False
    resume: bool = False


@dataclass(frozen=True)
class WorkDirectory:
    """The directory of a run in progress."""

    out: Path
    root: Path

    @property
    def files(self) -> Path:
        """Becomes the output directory."""
        return self.root / "files"

    @property
    def state(self) -> Path:
        """Holds what a resumed run continues from; never published."""
        return self.root / "state"

    def publish(self, manifest: Manifest) -> None:
        """Seal the manifest, sync every file, and put the directory in its final place by renaming it."""
        manifest.sealed().write(self.files)
        mode = self.root.stat().st_mode & 0o666  # as the umask has it; safetensors writes for the owner alone
        for path in sorted(self.files.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        sync(self.files)
        previous = _aside(self.out)
        if self.out.exists():
            self.out.rename(previous)
        self.files.rename(self.out)
        sync(self.out.parent)
        if previous.exists():
            shutil.rmtree(previous)
        shutil.rmtree(self.root)


def finished_run(options: OutputOptions, fingerprint: JsonValue) -> Manifest | None:
    """The manifest of an output that this very command has already finished, if `--resume` finds one.

    What a kill after the last rename left beside it is cleared away.
    """
    if not options.resume:
        return None
    _restore_interrupted_swap(options.path.resolve())
    if not (options.path / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(options.path)
    if run_fingerprint(manifest) != sha256_value(fingerprint):
        return None
    work = work_of(options.path)
    if work.root.exists():
        with _locked(work):
            shutil.rmtree(work.root)
    return manifest


def is_unfinished(out: Path) -> bool:
    """Whether a run of this output has begun and left its work directory, from which `--resume` would go on."""
    return _begun(work_of(out))


def run_fingerprint(manifest: Manifest) -> str:
    """The fingerprint of the run that wrote `manifest`; see `fingerprint_of`."""
    return sha256_value(fingerprint_of(manifest.command, manifest.parameters, manifest.seed, manifest.inputs))


def fingerprint_of(
    command: str, parameters: dict[str, JsonValue], seed: int, inputs: dict[str, Source]
) -> dict[str, JsonValue]:
    """What must be equal for one run to continue another: the command, its parameters, and its inputs' digests."""
    digests: dict[str, JsonValue] = {name: source.digest for name, source in inputs.items()}
    return {"command": command, "parameters": parameters, "seed": seed, "inputs": digests}


@contextmanager
def work_directory(options: OutputOptions, fingerprint: JsonValue) -> Iterator[WorkDirectory]:
    """Open the work directory of an output, new or resumed.

    A user's mistake found inside the context removes a work directory that this run began; any other interruption
    leaves it for `--resume`.

    Raises: OutputExistsError, OutputNotWritableError, UnfinishedRunError, MissingPathError, NoSpaceError.
    """
    check_output(options)
    work = work_of(options.path)
    resumed = _claim(work, options, sha256_value(fingerprint))
    with _locked(work):
        try:
            yield work
        except UserError as error:
            if not resumed and not isinstance(error, NoSpaceError):
                shutil.rmtree(work.root, ignore_errors=True)
            raise
        except (OSError, SafetensorError) as error:
            if _disk_is_full(error):
                raise NoSpaceError(
                    f"The disk of {work.out.parent} is full; free some space and run the same command with --resume."
                ) from error
            raise


def check_output(options: OutputOptions, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output path that is taken, has no parent, or lies in one of the inputs, before any work is done."""
    out, place = options.path, options.path.resolve()
    _restore_interrupted_swap(place)
    if not place.parent.is_dir():
        raise MissingPathError(f"{out.parent} does not exist; create it or choose another --out.")
    for directory in (path.resolve() for path in inputs):
        if directory == place or directory in place.parents or place in directory.parents:
            raise OutputExistsError(f"{out} and the input {directory} are inside each other; choose another --out.")
    if not os.access(place.parent, os.W_OK):
        raise _not_writable(place)
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputExistsError(f"{out} is a file; choose another --out.")
    ours = (out / MANIFEST_NAME).is_file()
    if _foreign_files(out):
        raise OutputExistsError(f"{out} holds files that spine did not write; choose another --out.")
    if ours and not options.overwrite:
        raise OutputExistsError(f"{out} exists; add --overwrite to replace it or choose another --out.")


def _foreign_files(out: Path) -> bool:
    """Whether a directory holds anything that its manifest does not list, so that replacing it would lose it."""
    if not (out / MANIFEST_NAME).is_file():
        return any(out.iterdir())
    listed = read_manifest(out).outputs
    files = (path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return any(path.relative_to(out).as_posix() not in listed for path in files)


def require_space(directory: Path, wanted: int) -> None:
    """Raise NoSpaceError if the disk of `directory` has fewer than `wanted` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise NoSpaceError(
            f"The output needs {wanted / 1e9:.2f} GB and the disk of {directory} has {free / 1e9:.2f} GB free; "
            "free some space or choose another --out."
        )


def _disk_is_full(error: Exception) -> bool:
    """Safetensors reports a full disk as an error of its own, with the system's number in the text."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC})" in str(error)


def _claim(work: WorkDirectory, options: OutputOptions, fingerprint: str) -> bool:
    """Create the work directory, or accept the one that is there; True if it is being resumed."""
    marker = _marker(work)
    if work.root.exists():
        with _locked(work):
            begun = _begun(work)
            if begun and options.resume:
                if json.loads(marker.read_text())["fingerprint"] == fingerprint:
                    for torn in work.files.rglob(".tmp*"):  # what safetensors was writing when it was killed
                        torn.unlink()
                    return True
                if not options.overwrite:
                    raise UnfinishedRunError(
                        f"The unfinished run of {work.out} had other options or inputs; repeat its command, or add "
                        "--overwrite to start over."
                    )
            if begun and not options.overwrite:
                raise UnfinishedRunError(
                    f"An unfinished run of {work.out} was found; add --resume to continue it or --overwrite to start "
                    "over."
                )
            shutil.rmtree(work.root)
    try:
        work.root.mkdir()
    except OSError as error:
        raise _not_writable(work.out) from error
    work.files.mkdir()
    work.state.mkdir()
    with whole_file(marker) as part:
        part.write_text(json.dumps({"fingerprint": fingerprint}))
    return False


def _marker(work: WorkDirectory) -> Path:
    return work.root / "run.json"


def _begun(work: WorkDirectory) -> bool:
    # without files, a kill came after their renaming
    return _marker(work).is_file() and work.files.is_dir()


def work_of(out: Path) -> WorkDirectory:
    """Where the run of an output works: beside the place that `out` means once links and dots are followed."""
    place = out.resolve()
    return WorkDirectory(place, place.parent / f".{place.name}.spine-work")


def _not_writable(place: Path) -> OutputNotWritableError:
    return OutputNotWritableError(f"{place.parent} cannot be written to; fix its permissions or choose another --out.")


@contextmanager
def _locked(work: WorkDirectory) -> Iterator[None]:
    """Hold the work directory against a second process; the system drops the lock when its holder dies."""
    with (work.root / "lock").open("w") as handle:
        try:
            _lock(handle)
        except OSError as error:
            raise UnfinishedRunError(f"Another process is writing {work.out}; wait for it to end.") from error
        yield


def _lock(handle: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system; the rename still keeps outputs whole
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.spine-previous"


def _restore_interrupted_swap(out: Path) -> None:
    """A kill between the two renames of an overwrite leaves the previous output aside: put it back or drop it."""
    previous = _aside(out)
    if previous.exists():
        if out.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(out)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
