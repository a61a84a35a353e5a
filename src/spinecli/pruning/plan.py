"""What a prune run will do, before it does it: what leaves each block, the sizes after, and what the run will need."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pydantic import JsonValue

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import ModelSize, model_size
from spinecli.checkpoints.cutting import written_family
from spinecli.checkpoints.family import Family
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape


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


def plan_prune(checkpoint: Checkpoint, masks: Masks, length: int, memory_bytes: int) -> PrunePlan:
    """Derive the plan of a uniform cut.

    Args:
        length: tokens per calibration row, at which the FLOPs of attention scores are counted.
        memory_bytes: estimated peak of the run, from `run_memory`.
    """
    shape = masks.uniform_shape(checkpoint.shape)
    return PrunePlan(
        masks=masks,
        dense=model_size(checkpoint, checkpoint.blocks, checkpoint.shape, length),
        cut=model_size(checkpoint, len(masks.kept_blocks), shape, length),
        dense_shape=checkpoint.shape,
        shape=shape,
        model_type=(family := written_family(checkpoint, shape)).model_type,
        engines=engines(family, checkpoint.d_model, shape),
        memory_bytes=memory_bytes,
    )


def engines(family: Family, d_model: int, shape: BlockShape) -> dict[str, str]:
    """Which inference engines take equal-width blocks of this shape; facts in docs/commands/prune.md."""
    found = {"transformers": "with trust_remote_code=True" if family.modelling_file else "yes"}
    if family.gguf_architecture is None:
        return found | {"llama.cpp": f"no: it has no {family.model_type} architecture"}
    found["llama.cpp f16"] = "yes"
    widths = (d_model, shape.heads * shape.head_dim, shape.channels)
    for name, multiple in (("llama.cpp Q8_0, Q4_0", 32), ("llama.cpp K-quants", 256)):
        ragged = [width for width in widths if width % multiple]
        found[name] = f"no: {ragged[0]} is not a multiple of {multiple}" if ragged else "yes"
    return found
