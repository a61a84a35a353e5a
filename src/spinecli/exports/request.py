"""What an export is asked for, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.tokenizer import require_fitting_tokenizer
from spinecli.errors import MissingPackageError, OptionError
from spinecli.exports.config import ExportConfig, Format, Quantization
from spinecli.exports.merging import merge
from spinecli.exports.output import check_directory_output, check_file_output


@dataclass(frozen=True)
class ExportRequest:
    """An export that can be carried out."""

    config: ExportConfig
    out: Path
    base: Checkpoint
    """As it lies on disk."""
    checkpoint: Checkpoint
    """With the adapter merged, if there is one."""
    quantization: Quantization | None
    """None for a format that keeps the stored dtype."""


def open_request(config: ExportConfig, out: Path, *, overwrite: bool = False) -> ExportRequest:
    """Check what is asked for and open what it names; no weight is read.

    Args:
        out: the file or directory to write.
        overwrite: whether an earlier export there may be replaced.

    Raises: OptionError, MissingPackageError, OutputExistsError, and what opening a checkpoint or an adapter raises.
    """
    gguf = config.format is Format.gguf
    if gguf and find_spec("gguf") is None:
        raise MissingPackageError("--format gguf needs the package gguf; install it with: pip install 'spinecli[gguf]'")
    if config.quantize is not None and not gguf:
        raise OptionError("--quantize is for --format gguf; --format hf keeps the precision of the checkpoint.")
    path = resolve_checkpoint(config.model)
    check = check_file_output if gguf else check_directory_output
    check(out, overwrite, path)
    base = checkpoint = Checkpoint.open(path)
    require_fitting_tokenizer(base)
    if config.adapter is not None:
        checkpoint = merge(base, config.adapter, rounded=not gguf)
    quantization = (config.quantize or Quantization.f16) if gguf else None
    return ExportRequest(config, out, base, checkpoint, quantization)
