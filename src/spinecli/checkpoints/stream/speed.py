"""How fast this machine multiplies matrices just now, to say beforehand how long a run will take."""

from __future__ import annotations

import time

import torch

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import CHUNK_TOKENS, ComputeOptions

_SECONDS = 0.2


def product_speed(checkpoint: Checkpoint, compute: ComputeOptions) -> float:
    """FLOPs a second of products of the model's size; measuring takes a moment."""
    width = max(shape.channels for shape in checkpoint.shapes)
    inputs = torch.ones(CHUNK_TOKENS, checkpoint.d_model, dtype=compute.dtype, device=compute.device)
    weight = torch.ones(width, checkpoint.d_model, dtype=compute.dtype, device=compute.device)
    (inputs @ weight.T).sum().item()
    start, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < _SECONDS:
        (inputs @ weight.T).sum().item()
        products += 1
    return products * 2 * inputs.numel() * width / spent
