"""What an export is asked for, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.tokenizer import require_fitting_tokenizer
from spinecli.choice import choice
from spinecli.errors import MissingPackageError, OptionError
from spinecli.export.merging import merge
from spinecli.export.output import check_directory_output, check_file_output

if TYPE_CHECKING:
    from spinecli.export.storage import Quantization


class Format(str, Enum):
    """What an export can be written as."""

    gguf = "gguf"
    """One file for llama.cpp and what is built on it."""
    hf = "hf"
    """A Hugging Face directory."""


@dataclass(frozen=True)
class ExportConfig:
    """The options of `spine export`."""

    model: str
    format: str
    out: Path
    adapter: Path | None = None
    quantize: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class ExportRequest:
    """An export that can be carried out."""

    options: ExportConfig
    format: Format
    base: Checkpoint
    """As it lies on disk."""
    checkpoint: Checkpoint
    """With the adapter merged, if there is one."""
    quantization: Quantization | None
    """None for a format that keeps the stored dtype."""


def open_request(options: ExportConfig) -> ExportRequest:
    """Check the options and open what they name; no weight is read.

    Raises: OptionError, MissingPackageError, OutputExistsError, and what opening a checkpoint or an adapter raises.
    """
    wanted = choice("--format", Format, options.format)
    quantization = None
    if wanted is Format.gguf:
        if find_spec("gguf") is None:
            raise MissingPackageError(
                "--format gguf needs the package gguf; install it with: pip install 'spinecli[gguf]'"
            )
        from spinecli.export.storage import Quantization

        quantization = choice("--quantize", Quantization, options.quantize or "f16")
    elif options.quantize is not None:
        raise OptionError("--quantize is for --format gguf; --format hf keeps the precision of the checkpoint.")
    path = resolve_checkpoint(options.model)
    check = check_file_output if wanted is Format.gguf else check_directory_output
    check(options.out, options.overwrite, path)
    base = checkpoint = Checkpoint.open(path)
    require_fitting_tokenizer(base)
    if options.adapter is not None:
        checkpoint = merge(base, options.adapter, rounded=wanted is Format.hf)
    return ExportRequest(options, wanted, base, checkpoint, quantization)
