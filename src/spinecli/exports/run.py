"""Carrying out an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.directory import require_space
from spinecli.artifacts.manifest import record_files, sha256_file
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.stream.verify import random_rows, streamed_logits, verify_reading, verify_written
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.exports.config import Format, Quantization
from spinecli.exports.merging import adapted_modules
from spinecli.exports.output import whole_directory, whole_file
from spinecli.exports.request import ExportRequest
from spinecli.lora.peft_adapter import adapter_shapes
from spinecli.progress import Progress, silent


def write_huggingface(
    directory: Path, checkpoint: Checkpoint, stopwatch: Stopwatch, progress: Progress = silent
) -> float:
    """Write the checkpoint in its stored dtype and open it again; the largest difference of its logits.

    Raises: VerificationError if the written checkpoint computes something else, NoSpaceError.
    """
    with stopwatch("writing"):
        write_checkpoint(
            directory,
            checkpoint.raw_config,
            checkpoint.groups(),
            checkpoint.companions or checkpoint.path,
            progress,
            tokenizer_of=checkpoint.path,
        )
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # as the umask has it; safetensors writes for the owner alone
    with stopwatch("verifying"):
        tokens = random_rows(checkpoint)
        expected = streamed_logits(checkpoint, tokens)
        return verify_written(directory, tokens, expected, ComputeOptions(), stopwatch)


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    report: dict[str, JsonValue]
    notes: tuple[str, ...] = field(default=())


def export(request: ExportRequest, stopwatch: Stopwatch, progress: Progress = silent) -> Exported:
    """Write what is asked for, whole or not at all.

    Raises: UnexportableError, VerificationError, NoSpaceError, UnfinishedRunError, TokenizerError, and what reading the
        checkpoint raises.
    """
    with stopwatch("verifying"):
        verify_reading(request.base, random_rows(request.base))
    if request.config.format is Format.gguf:
        return _export_gguf(request, stopwatch, progress)
    return _export_huggingface(request, stopwatch, progress)


def _export_gguf(request: ExportRequest, stopwatch: Stopwatch, progress: Progress) -> Exported:
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
        with stopwatch("writing"):
            write_gguf(part, model, progress)
        verdict = None
        if llamacpp.available():
            with stopwatch("verifying"):
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


def _export_huggingface(request: ExportRequest, stopwatch: Stopwatch, progress: Progress) -> Exported:
    out, checkpoint = request.out, request.checkpoint
    require_space(out.resolve().parent, checkpoint.bytes)
    with whole_directory(out) as part:
        difference = write_huggingface(part, checkpoint, stopwatch, progress)
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
