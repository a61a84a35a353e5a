"""Features and their gradients as they cross the cut: real tokens only, in the precision that the user chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spinecli.errors import MessageError

FeatureDtype = Literal["fp32", "bf16", "int8"]

_LARGEST = 127
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_SCALE_BYTES = 4


def bytes_per_token(d_model: int, dtype: FeatureDtype) -> int:
    """Bytes that the features of one token take in a message."""
    return d_model * _TYPES[dtype].itemsize + (_SCALE_BYTES if dtype == "int8" else 0)


def packed(values: Tensor, dtype: FeatureDtype) -> dict[str, Tensor]:
    """Tensors of a message that carry `values` (tokens, d_model).

    int8 keeps one scale a token, its largest absolute value over 127, and rounds to the nearest: the error of a number
    is at most half of that scale.
    """
    if dtype != "int8":
        return {"values": values.to(_TYPES[dtype])}
    scales = values.abs().amax(dim=1).float() / _LARGEST
    steps = torch.where(scales > 0, scales, 1.0)[:, None]
    return {"values": (values.float() / steps).round().to(torch.int8), "scales": scales}


def unpacked(tensors: Mapping[str, Tensor], tokens: int, d_model: int, dtype: FeatureDtype) -> Tensor:
    """What `packed` carries, (tokens, d_model) float32. Raises MessageError if it is not of this size or type."""
    values = tensors.get("values")
    if values is None or values.dtype is not _TYPES[dtype] or tuple(values.shape) != (tokens, d_model):
        found = "none" if values is None else f"{list(values.shape)} of {values.dtype}"
        raise MessageError(f"Its features are {found}, not {[tokens, d_model]} of {dtype}.")
    whole = values.float()
    if dtype == "int8":
        scales = tensors.get("scales")
        if scales is None or scales.dtype is not torch.float32 or tuple(scales.shape) != (tokens,):
            raise MessageError("Its features come without one scale a token.")
        whole = whole * scales[:, None]
    if not bool(torch.isfinite(whole).all()):
        raise MessageError("Its features hold NaN or infinite values.")
    return whole


def padded(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of equal length: values (tokens, ...) -> (rows, longest, ...) and a mask (rows, longest) int64."""
    rows = pad_sequence(list(torch.split(values, lengths.tolist())), batch_first=True)
    mask = torch.arange(rows.shape[1]) < lengths[:, None]
    return rows, mask.to(torch.int64)


def unpadded(values: Tensor, mask: Tensor) -> Tensor:
    """The real tokens of padded rows: (rows, length, ...) -> (tokens, ...), row after row."""
    return values[mask.bool()]
