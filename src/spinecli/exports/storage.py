"""In which type each tensor is stored, and its bytes in that type.

Matrices take the type that was asked for; vectors stay float32, since llama.cpp adds and multiplies by them in that
precision. Quantised rows are cut into blocks of 32 values, so a matrix with other rows falls back to f16.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinecli.errors import UnexportableError
from spinecli.exports.config import Quantization
from spinecli.exports.layout import GgufTensor

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
