"""What a run will cost, said before it starts: memory in bytes, and time in forward passes of the calibration rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import JsonValue

from spinecli.checkpoints.counting import block_costs, size_of
from spinecli.checkpoints.stream.block_stream import CHUNK_TOKENS
from spinecli.checkpoints.stream.speed import product_speed
from spinecli.pruning.adaptive.sensitivity import trial_bytes
from spinecli.pruning.decision import COMPARED, possible_allocations, sizes_after
from spinecli.pruning.method import gram_precision
from spinecli.pruning.request import PruneRequest
from spinecli.pruning.run import TURNS
from spinecli.pruning.search import search_rows

# Resident memory of Python with torch and transformers imported, before any weight is read.
_IMPORTS_BYTES = 450_000_000
# Allocations compared at once; see `allocation.BLOCK_SHARES`.
_CANDIDATES = 5
# Matrices of a projection's size, and of its inputs' Gram matrix' size, that a re-fit holds at once.
_ANSWERS = 6
_SQUARES = 4
_FLOAT = torch.float32.itemsize


def run_memory(request: PruneRequest) -> int:
    """Estimated peak resident bytes of the run: the largest of its moments, none of which holds more than one block."""
    checkpoint, calibration = request.checkpoint, request.calibration
    weights = request.compute.dtype.itemsize
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
    solving = gram_precision(width).itemsize * _SQUARES * width**2 + _ANSWERS * width * d_model * _FLOAT
    if request.searches:
        tokens = sum(search_rows(calibration.rows, calibration.length)) * calibration.length
        moments.append(block + solving + tokens * (5 + _CANDIDATES) * d_model * _FLOAT)
    if request.method.refits:
        tokens = calibration.rows * calibration.length
        moments.append(block + solving + (4 * tokens * d_model + chunk * (4 * d_model + 5 * width)) * _FLOAT)
    if request.adaptive:
        moments.append(block + trial_bytes(checkpoint.blocks, calibration.length, d_model, calibration.rows))
    moments.append(calibration.memory_bytes)
    return _IMPORTS_BYTES + streams + max(moments)


@dataclass(frozen=True)
class PredictedTime:
    """How long a run is going to take."""

    passes: float
    """In forward passes of the dense model's blocks over all calibration rows."""
    seconds: float
    """With the speed at which this machine multiplies matrices of the model's size just now."""


# What each part of a run costs for each of its rows, in forward passes of the blocks: rounded from a profile of a model
# of 135M parameters.
_TEACHER = 1.1
_GRAMS = 1.6
_STUDENT = 2.0
_TURN = 4.0
_LOOKING_ON = 1.0


def predicted_time(request: PruneRequest) -> PredictedTime:
    """An estimate, good to about a third; sensitivities of adaptive widths are counted as one candidate a sub-layer."""
    rows, length = request.calibration.rows, request.calibration.length
    fitted, judged = search_rows(rows, length)
    passes = _GRAMS if request.scoring is request.method else (fitted + judged) / rows
    if request.searches:
        shares, factors = COMPARED[request.config.effort]
        each = (_STUDENT * fitted + _LOOKING_ON * judged) / rows
        passes += (len(shares) + len(factors)) * each + 2 * _TEACHER * (fitted + judged) / rows
    if request.adaptive:
        passes += request.checkpoint.blocks * 4 * _LOOKING_ON * min(8, rows) / rows / 2 + _STUDENT
    if request.method.refits:
        passes += _TEACHER + _STUDENT
        if turns := TURNS[request.config.effort]:
            passes += turns.rounds * (_STUDENT / 3 + _TURN * min(1.0, turns.tokens / (rows * length)))
    work = size_of(request.checkpoint, length).block_flops_per_token * rows * length
    return PredictedTime(passes, passes * work / product_speed(request.checkpoint, request.compute))


def foresee(request: PruneRequest) -> dict[str, JsonValue]:
    """What can be said of a run without a look at any token: the cuts to choose from, memory and time.

    Raises: OptionError if no cut meets the budget.
    """
    needed = predicted_time(request)
    possible: list[JsonValue] = []
    for allocation in possible_allocations(request):
        plan = sizes_after(request, allocation)
        possible.append({**allocation.report(), "achieved_sparsity": plan.sparsity, **plan.sizes()})
    return {
        "possible": possible,
        "memory_bytes": run_memory(request),
        "predicted_passes": needed.passes,
        "predicted_seconds": needed.seconds,
    }
