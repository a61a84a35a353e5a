"""What can go wrong by a user's hand: one class per kind of mistake.

Each is raised where the mistake is found, with one sentence that names the file or the option and the way
out. `Terminal.reporting_errors` of `spinecli.console` renders all of them; the exit code travels with the class.
"""

from __future__ import annotations

from pathlib import Path


def reason_of(error: BaseException, line: int = 0) -> str:
    """A library's own reason as part of a sentence: one line of its message, or the error's kind if it has none."""
    lines = [each.strip() for each in str(error).strip().splitlines()]
    return lines[line].rstrip(".") if lines else type(error).__name__


class SpineError(Exception):
    """Something failed while running; the command ends with exit code 1."""

    exit_code = 1


class VerificationError(SpineError):
    """A written checkpoint does not compute what it was meant to compute."""


class MeasurementError(SpineError):
    """An evaluation started and could not be finished."""


class FederationError(SpineError):
    """A federated run cannot go on."""


class TrainingError(SpineError):
    """Training went astray."""


class MessageError(SpineError):
    """A message between server and device is malformed or is not what was asked for."""


class UserError(SpineError):
    """Wrong usage or bad input; the command ends with exit code 2."""

    exit_code = 2


class OptionError(UserError):
    """An option's value is out of range, or two options contradict each other."""


class RecipeError(UserError):
    """A recipe names a command, an option or a step that does not exist."""


class MissingPathError(UserError):
    """A path that was named does not exist."""


class NotACheckpointError(UserError):
    """A directory does not hold a Hugging Face checkpoint."""


class UnsupportedFamilyError(UserError):
    """The architecture is none of those that spine knows."""


class DamagedCheckpointError(UserError):
    """A checkpoint's files contradict each other or cannot be read."""


class NonFiniteWeightsError(UserError):
    """A weight tensor holds NaN or infinite values."""


class UnsafeFileError(UserError):
    """A file could run code or reach outside its directory when opened, so it is not opened."""


class TokenizerError(UserError):
    """A checkpoint's tokenizer is absent, or its files cannot be read."""


class CalibrationTextError(UserError):
    """A text is unreadable, empty, or too short for what was asked of it."""


class CannotWriteError(UserError):
    """A model that is no causal language model is asked to write text."""


class FleetError(UserError):
    """A fleet file is unreadable, or one of its values is out of range."""


class DataError(UserError):
    """A data set to train or evaluate on cannot be read, or lacks what its task needs."""


class OutputExistsError(UserError):
    """The output path is taken."""


class OutputNotWritableError(UserError):
    """The directory that the output would lie in refuses new files."""


class UnfinishedRunError(UserError):
    """A killed run left its work beside the output path."""


class ForeignArtifactError(UserError):
    """A directory is not the artifact that this command reads."""


class DamagedArtifactError(UserError):
    """An artifact's files differ from the sums in its spine.json."""


class NoSpaceError(UserError):
    """The disk has no room for the output."""


class OfflineError(UserError):
    """Something had to be fetched and could not be."""


class UnexportableError(UserError):
    """A checkpoint has something that the format asked for cannot express."""

    def __init__(self, reason: str, path: Path | None = None, remedy: str = "use --format hf") -> None:
        """Args: what is in the way, which checkpoint that is said of (None: the reason says it), and the way out."""
        super().__init__(f"{reason if path is None else f'{path} {reason}'}; {remedy}.")
        self.reason = reason


class MissingPackageError(UserError):
    """An optional package that this option needs is not installed."""
