"""Carrying out an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import require_space
from spinecli.artifacts.manifest import record_files, sha256_file
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.stream.verify import random_rows, streamed_logits, verify_reading, verify_written
from spinecli.checkpoints.tokenizer import require_fitting_tokenizer, tokenizer_of
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.errors import MissingPackageError, OptionError
from spinecli.exports.config import ExportConfig, Format, Quantization
from spinecli.exports.merging import adapted_modules, merge
from spinecli.exports.output import check_directory_output, check_file_output, whole_directory, whole_file
from spinecli.lora.peft_adapter import adapter_shapes


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


def write_huggingface(directory: Path, checkpoint: Checkpoint, context: RunContext) -> float:
    """Write the checkpoint in its stored dtype and open it again; the largest difference of its logits.

    Raises: VerificationError if the written checkpoint computes something else, NoSpaceError.
    """
    with context.stopwatch("writing"):
        write_checkpoint(
            directory,
            checkpoint.raw_config,
            checkpoint.groups(),
            checkpoint.companions or checkpoint.path,
            context,
            tokenizer_of=checkpoint.path,
        )
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # as the umask has it; safetensors writes for the owner alone
    with context.stopwatch("verifying"):
        tokens = random_rows(checkpoint)
        expected = streamed_logits(checkpoint, tokens)
        return verify_written(directory, tokens, expected, ComputeOptions(), context)


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    report: dict[str, JsonValue]
    notes: tuple[str, ...] = field(default=())


def export(request: ExportRequest, context: RunContext) -> Exported:
    """Write what is asked for, whole or not at all.

    Raises: UnexportableError, VerificationError, NoSpaceError, UnfinishedRunError, TokenizerError, and what reading the
        checkpoint raises.
    """
    with context.stopwatch("verifying"):
        verify_reading(request.base, random_rows(request.base))
    if request.config.format is Format.gguf:
        return _export_gguf(request, context)
    return _export_huggingface(request, context)


def _export_gguf(request: ExportRequest, context: RunContext) -> Exported:
    from spinecli.exports import llamacpp
    from spinecli.exports.gguf_file import write_gguf
    from spinecli.exports.gguf_model import gguf_model
    from spinecli.exports.verification import verify

    out, checkpoint = request.out, request.checkpoint
    quantization = request.quantization or Quantization.f16
    tokenizer = tokenizer_of(checkpoint)
    model, notes = gguf_model(checkpoint, tokenizer, quantization)
    require_space(out.resolve().parent, model.bytes)
    with whole_file(out) as part:
        with context.stopwatch("writing"):
            write_gguf(part, model, context)
        verdict = None
        if llamacpp.available():
            with context.stopwatch("verifying"):
                texts = tokenizer if model.tokenizer.tokens else None
                verdict = verify(part, checkpoint, texts, quantization)
    if verdict and verdict.texts_alike < verdict.texts:
        notes = (
            *notes,
            f"llama.cpp cuts {verdict.texts - verdict.texts_alike} of {verdict.texts} test texts into other tokens "
            "than the checkpoint's tokenizer",
        )
    report: dict[str, JsonValue] = {
        "format": request.config.format.value,
        "architecture": model.architecture.name,
        "model_type": checkpoint.family.model_type,
        "blocks": [
            {"heads": shape.heads, "kv_heads": shape.kv_heads, "channels": shape.channels} for shape in model.shapes
        ],
        "filled_blocks": [index for index, shape in enumerate(model.shapes) if shape != checkpoint.shapes[index]],
        "quantize": quantization.value,
        "tensors": dict(model.tensors_by_type()),
        "fallen_back_to_f16": list(model.fallen_back()),
        "tokenizer": model.tokenizer.description,
        "context": model.context,
        "adapter": _adapter(request),
        "bytes": out.stat().st_size,
        "sha256": sha256_file(out),
        "llama_cpp": None
        if verdict is None
        else {
            "logit_difference": verdict.logit_difference,
            "texts": verdict.texts,
            "texts_alike": verdict.texts_alike,
        },
        "notes": list(notes),
    }
    return Exported(report, notes)


def _export_huggingface(request: ExportRequest, context: RunContext) -> Exported:
    out, checkpoint = request.out, request.checkpoint
    require_space(out.resolve().parent, checkpoint.bytes)
    with whole_directory(out) as part:
        difference = write_huggingface(part, checkpoint, context)
    files = record_files(out)
    report: dict[str, JsonValue] = {
        "format": request.config.format.value,
        "architecture": str(checkpoint.raw_config.get("architectures", [None])[0]),
        "model_type": checkpoint.family.model_type,
        "tensors": {str(checkpoint.storage_dtype).removeprefix("torch."): len(checkpoint.tensors)},
        "adapter": _adapter(request),
        "bytes": sum(record.bytes for record in files.values()),
        "files": {name: record.sha256 for name, record in files.items()},
        "logit_difference": difference,
        "notes": [],
    }
    return Exported(report)


def _adapter(request: ExportRequest) -> JsonValue:
    """What was merged: where it lay, and into how many tensors it went."""
    adapter = request.config.adapter
    if adapter is None:
        return None
    return {"path": str(adapter), "merged_tensors": len(adapted_modules(adapter_shapes(adapter)))}
