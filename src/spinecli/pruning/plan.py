"""What a prune run will do, before it does it: what leaves each block, the sizes after, and what the run will need."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from pydantic import JsonValue

from spinecli.calibration.stream import CHUNK_TOKENS
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import ModelSize, block_costs, model_size
from spinecli.checkpoints.cutting import cut_config
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape

# Resident memory of Python with torch and transformers imported, before any weight is read.
_IMPORTS_BYTES = 450_000_000


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """Masks and what follows from them."""

    masks: Masks
    dense: ModelSize
    cut: ModelSize
    dense_shape: BlockShape
    shape: BlockShape
    """Of every kept block."""
    model_type: str
    """Family the result is written as."""
    engines: dict[str, str]
    """Engine -> "yes", or what stands in the way."""
    memory_bytes: int
    """Estimated peak resident memory of the run."""

    @property
    def sparsity(self) -> float:
        """Achieved share of block parameters removed."""
        return 1 - self.cut.block_parameters / self.dense.block_parameters

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            "achieved_sparsity": self.sparsity,
            "removed_blocks": list(self.masks.removed_blocks),
            "removed_by_block": [
                {
                    "block": index,
                    "kv_heads": (~mask.kv_heads(self.dense_shape)).nonzero().flatten().tolist(),
                    "channels": int((~mask.channels).sum()),
                }
                for index, mask in enumerate(self.masks.blocks)
            ],
            "shape_before": asdict(self.dense_shape),
            "shape_after": asdict(self.shape),
            "model_type": self.model_type,
            "dense": asdict(self.dense),
            "cut": asdict(self.cut),
            "engines": dict(self.engines),
        }


def plan_prune(checkpoint: Checkpoint, masks: Masks, rows: int, length: int, *, gram: bool) -> PrunePlan:
    """Derive the plan of a uniform cut.

    Args:
        rows, length: of the calibration tokens, for the memory estimate and the attention FLOPs.
        gram: whether the method accumulates Gram matrices.
    """
    shape = masks.uniform_shape(checkpoint.shape)
    return PrunePlan(
        masks=masks,
        dense=model_size(checkpoint, checkpoint.blocks, checkpoint.shape, length),
        cut=model_size(checkpoint, len(masks.kept_blocks), shape, length),
        dense_shape=checkpoint.shape,
        shape=shape,
        model_type=str(cut_config(checkpoint, masks)["model_type"]),
        engines=engines(shape),
        memory_bytes=run_memory(checkpoint, rows, length, gram=gram),
    )


def engines(shape: BlockShape) -> dict[str, str]:
    """Which inference engines take equal-width blocks of this shape; facts in docs/commands/prune.md."""
    widths = (shape.heads * shape.head_dim, shape.channels)
    found = {"transformers": "yes", "llama.cpp f16": "yes"}
    for name, multiple in (("llama.cpp Q8_0, Q4_0", 32), ("llama.cpp K-quants", 256)):
        ragged = [width for width in widths if width % multiple]
        found[name] = f"no: {ragged[0]} is not a multiple of {multiple}" if ragged else "yes"
    return found


def run_memory(checkpoint: Checkpoint, rows: int, length: int, *, gram: bool) -> int:
    """Estimated peak resident bytes of a scoring pass in float32: the larger of the embedding and one block at work."""
    size = torch.float32.itemsize
    shape, d_model = checkpoint.shape, checkpoint.d_model
    streams = 2 * rows * length * d_model * size
    outer = sum(torch.Size(checkpoint.tensors[name].shape).numel() for name in checkpoint.outer_names()) * size
    chunk = max(CHUNK_TOKENS, length)
    activations = chunk * (4 * d_model + 3 * shape.channels) * size + 2 * chunk * shape.channels * 8
    matrices = 3 * max(shape.channels, shape.heads * shape.head_dim) ** 2 * size if gram else 0
    block = block_costs(checkpoint).block * size
    return _IMPORTS_BYTES + streams + max(outer, block + activations + matrices)
