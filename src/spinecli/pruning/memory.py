"""How much memory a prune run will need, estimated from shapes before it starts."""

from __future__ import annotations

import torch

from spinecli.calibration.stream import CHUNK_TOKENS
from spinecli.checkpoints.counting import block_costs
from spinecli.pruning.adaptive.sensitivity import trial_bytes
from spinecli.pruning.request import PruneRequest

# Resident memory of Python with torch and transformers imported, before any weight is read.
_IMPORTS_BYTES = 450_000_000
# Allocations compared at once; see `allocation.BLOCK_SHARES`.
_CANDIDATES = 5
# Matrices of a projection's size that re-fitting both ends of a gated layer holds at once.
_ANSWERS = 6
_FLOAT = torch.float32.itemsize


def run_memory(request: PruneRequest) -> int:
    """Estimated peak resident bytes of the run: the largest of its moments, none of which holds more than one block."""
    checkpoint, calibration = request.checkpoint, request.calibration
    weights = request.options.compute.dtype.itemsize
    d_model = checkpoint.d_model
    width = max(max(shape.channels, shape.heads * shape.head_dim) for shape in checkpoint.shapes)
    outer = max(torch.Size(checkpoint.tensors[name].shape).numel() for name in checkpoint.outer_names()) * weights
    block = max(block_costs(checkpoint, index).block for index in range(checkpoint.blocks)) * weights
    chunk = max(CHUNK_TOKENS, calibration.length)
    streams = 2 * calibration.rows * calibration.length * d_model * _FLOAT
    scoring = block + chunk * (4 * d_model + 5 * width) * _FLOAT
    if request.method.needs_gram:
        scoring += int(1.2 * width * width + width * d_model) * _FLOAT
    moments = [outer, scoring]
    if request.searches:
        tokens = request.search_rows * calibration.length
        lessons = tokens * (5 + _CANDIDATES) * d_model
        refit = tokens * (3 * d_model + 3 * width) + 2 * min(tokens, width) ** 2
        moments.append(block + (lessons + refit) * _FLOAT)
    if request.method.refits:
        tokens = calibration.rows * calibration.length
        # mask tuning competes in every turn, and its normal matrix is (width, width) however few the tokens are
        solving = max(2 * min(tokens, width) ** 2, width**2 + _ANSWERS * width * d_model)
        moments.append(block + (tokens * (4 * d_model + 3 * width) + solving) * _FLOAT)
    if request.adaptive:
        moments.append(block + trial_bytes(checkpoint.blocks, calibration.length, d_model, calibration.rows))
    return _IMPORTS_BYTES + streams + max(moments)
