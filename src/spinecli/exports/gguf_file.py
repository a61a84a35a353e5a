"""Writing a GGUF file: what it says about model and tokenizer first, then one tensor after the other."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import UnexportableError
from spinecli.exports.architecture import Architecture
from spinecli.exports.config import Quantization
from spinecli.exports.layout import GgufTensor, lay_out
from spinecli.exports.rotary import Rotary
from spinecli.exports.tokenizer import GgufTokenizer

GgmlType = gguf.GGMLQuantizationType

_CHUNK_VALUES = 4 << 20
"""Values that are converted together: bounds the memory of a large embedding's float32 copy."""
_LARGEST_F16 = 65504.0
_TOKEN_MATRICES = ("token_embd.weight", "output.weight")
_TYPES = {
    Quantization.f32: GgmlType.F32,
    Quantization.f16: GgmlType.F16,
    Quantization.q8_0: GgmlType.Q8_0,
    Quantization.q4_0: GgmlType.Q4_0,
}
FILE_TYPES = {
    Quantization.f32: gguf.LlamaFileType.ALL_F32,
    Quantization.f16: gguf.LlamaFileType.MOSTLY_F16,
    Quantization.q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Quantization.q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}


def storage_type(tensor: GgufTensor, quantization: Quantization) -> GgmlType:
    """The type that a tensor is stored in."""
    if len(tensor.shape) < 2 or tensor.exact:
        return GgmlType.F32
    wanted = _TYPES[quantization]
    if wanted is GgmlType.Q4_0 and tensor.name in _TOKEN_MATRICES:
        wanted = GgmlType.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else GgmlType.F16


def falls_back(tensor: GgufTensor, quantization: Quantization) -> bool:
    """Whether a matrix's rows do not fit the quantised type, so that it is stored in f16."""
    return (
        len(tensor.shape) > 1
        and not tensor.exact
        and quantization in (Quantization.q8_0, Quantization.q4_0)
        and storage_type(tensor, quantization) is GgmlType.F16
    )


def stored_bytes(shape: tuple[int, ...], stored: GgmlType) -> int:
    """Size of a tensor of `shape` in the file."""
    block, size = gguf.GGML_QUANT_SIZES[stored]
    return torch.Size(shape).numel() // block * size


def encode(name: str, value: Tensor, stored: GgmlType) -> NDArray[np.uint8]:
    """The bytes of a tensor in `stored` type, rounded once from float32.

    Raises: UnexportableError if a value is too large for f16.
    """
    rows = value.reshape(-1, value.shape[-1])
    encoded = np.empty(stored_bytes(tuple(value.shape), stored), dtype=np.uint8)
    step = max(1, _CHUNK_VALUES // rows.shape[1])
    start = 0
    for chunk in torch.split(rows, step):
        exact = chunk.float().contiguous().numpy()
        if stored is GgmlType.F16 and exact.size and float(np.abs(exact).max()) > _LARGEST_F16:
            raise UnexportableError(
                f"{name} holds {float(np.abs(exact).max()):.4g}, more than f16 can", remedy="use --quantize f32"
            )
        part = np.ascontiguousarray(gguf.quants.quantize(exact, stored)).view(np.uint8).reshape(-1)
        encoded[start : start + part.size] = part
        start += part.size
    return encoded


_UNQUANTIZED = np.dtype(np.float32)
"""The writer takes shapes under this dtype as they are; under uint8 it would take them for shapes in bytes."""


@dataclass(frozen=True)
class GgufModel:
    """Everything that a file is written from; no weight has been read yet."""

    checkpoint: Checkpoint
    architecture: Architecture
    shapes: tuple[BlockShape, ...]
    """Of the blocks as they are written."""
    rotary: Rotary | None
    tokenizer: GgufTokenizer
    quantization: Quantization
    name: str
    context: int
    """Longest row in tokens."""
    windows: tuple[bool, ...] | None = None
    """Which blocks slide a window of attention, where the architecture can."""

    @property
    def tensors(self) -> list[GgufTensor]:
        """In the order of the file."""
        factors = self.rotary.factors if self.rotary else None
        return lay_out(self.checkpoint, self.architecture, self.shapes, factors)

    @property
    def bytes(self) -> int:
        """Size of all tensors in the file."""
        return sum(stored_bytes(tensor.shape, storage_type(tensor, self.quantization)) for tensor in self.tensors)

    def tensors_by_type(self) -> dict[str, int]:
        """Number of tensors by the type that they are stored in."""
        return dict(Counter(storage_type(tensor, self.quantization).name.lower() for tensor in self.tensors))

    def fallen_back(self) -> list[str]:
        """Matrices whose rows do not fit the quantised type."""
        return [tensor.name for tensor in self.tensors if falls_back(tensor, self.quantization)]


def model_settings(model: GgufModel) -> dict[str, str | int | float | bool | list[int] | list[bool]]:
    """The keys of the architecture, without its name before them."""
    shapes, config = model.shapes, model.checkpoint.config
    first = shapes[0]
    settings: dict[str, str | int | float | bool | list[int] | list[bool]] = {
        "vocab_size": int(config.vocab_size),
        "context_length": model.context,
        "embedding_length": model.checkpoint.d_model,
        "block_count": len(shapes),
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        model.architecture.epsilon_key: float(getattr(config, model.architecture.epsilon)),
    }
    counts = {
        "feed_forward_length": [shape.channels for shape in shapes],
        "attention.head_count": [shape.heads for shape in shapes],
        "attention.head_count_kv": [shape.kv_heads for shape in shapes],
    }
    for key, each in counts.items():
        settings[key] = each if model.architecture.per_block else each[0]
    if model.rotary:
        settings["rope.dimension_count"] = model.rotary.dimensions
        settings["rope.freq_base"] = model.rotary.base
        settings |= {f"rope.{key}": value for key, value in model.rotary.settings.items()}
    for key, source in model.architecture.settings.items():
        value = getattr(config, source, None)
        if value is not None:
            settings[key] = value
    if model.windows is not None:
        settings["attention.sliding_window"] = int(config.sliding_window)
        settings["attention.sliding_window_pattern"] = list(model.windows)
    return settings


def write_gguf(path: Path, model: GgufModel, context: RunContext | None = None) -> None:
    """Write the file; one tensor is in memory at a time.

    Raises: UnexportableError if a value does not fit its type, and what reading the checkpoint raises.
    """
    context = context or RunContext()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(None, model.architecture.name)
    _describe_model(writer, model)
    _describe_tokenizer(writer, model.tokenizer)
    tensors = model.tensors
    types = [storage_type(tensor, model.quantization) for tensor in tensors]
    for tensor, stored in zip(tensors, types, strict=True):
        size = stored_bytes(tensor.shape, stored)
        writer.add_tensor_info(tensor.name, tensor.shape, _UNQUANTIZED, size, raw_dtype=stored)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (tensor, stored) in enumerate(zip(tensors, types, strict=True)):
            writer.write_tensor_data(encode(tensor.name, tensor.make(), stored))
            context.progress("writing", done + 1, len(tensors))
    finally:
        writer.close()


def _describe_model(writer: gguf.GGUFWriter, model: GgufModel) -> None:
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_file_type(FILE_TYPES[model.quantization])
    if model.quantization in (Quantization.q8_0, Quantization.q4_0):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in model_settings(model).items():
        _add(writer, f"{model.architecture.name}.{key}", value)


def _add(writer: gguf.GGUFWriter, key: str, value: str | int | float | bool | Sequence[int] | Sequence[bool]) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _describe_tokenizer(writer: gguf.GGUFWriter, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    for role, index in tokenizer.special_ids.items():
        adder = getattr(writer, f"add_{role}_token_id", None)
        if adder is not None:
            adder(index)
    if tokenizer.model == "no_vocab":
        return
    if tokenizer.pre:
        writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    for role, added in tokenizer.adds.items():
        getattr(writer, f"add_add_{role}_token")(added)
    if tokenizer.space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.space_prefix)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
