"""A checkpoint as a plain Hugging Face directory: adapter merged, nothing of spine's beside it."""

from __future__ import annotations

from pathlib import Path

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.reload import random_rows, streamed_logits, verify_written
from spinecli.calibration.stream import ComputeOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.progress import Progress, silent


def write_huggingface(
    directory: Path, checkpoint: Checkpoint, stopwatch: Stopwatch, progress: Progress = silent
) -> float:
    """Write the checkpoint in its stored dtype and open it again; the largest difference of its logits.

    Raises: VerificationError if the written checkpoint computes something else, NoSpaceError.
    """
    with stopwatch("writing"):
        write_checkpoint(directory, checkpoint.raw_config, checkpoint.groups(), checkpoint.path, progress)
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # as the umask has it; safetensors writes for the owner alone
    with stopwatch("verifying"):
        tokens = random_rows(checkpoint)
        expected = streamed_logits(checkpoint, tokens)
        return verify_written(directory, tokens, expected, ComputeOptions(), stopwatch)
