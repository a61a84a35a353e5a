"""What a prune run will do, before it does it: what leaves each block, the sizes after, and what the run will need."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pydantic import JsonValue

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import ModelSize, size_of
from spinecli.checkpoints.cutting import cut_checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import UnexportableError
from spinecli.exports.gguf_shape import gguf_shape_of


def engines(cut: Checkpoint) -> dict[str, str]:
    """Engine or precision -> "yes", or why not; `spine export` decides the same way."""
    found = {"transformers": "with trust_remote_code=True" if cut.family.modelling_file else "yes"}
    try:
        shapes = gguf_shape_of(cut).shapes
    except UnexportableError as error:
        return found | {"llama.cpp": f"no: {error.reason}"}
    found["llama.cpp f16"] = "yes"
    widths = {cut.d_model} | {width for shape in shapes for width in (shape.heads * shape.head_dim, shape.channels)}
    for name, multiple in (("llama.cpp Q8_0, Q4_0", 32), ("llama.cpp K-quants", 256)):
        ragged = sorted(width for width in widths if width % multiple)
        found[name] = f"no: {ragged[0]} is not a multiple of {multiple}" if ragged else "yes"
    return found


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """Masks and what follows from them."""

    masks: Masks
    dense: ModelSize
    cut: ModelSize
    dense_shapes: tuple[BlockShape, ...]
    """Of every block before the cut."""
    shapes: tuple[BlockShape, ...]
    """Of every kept block, after it."""
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
                    "kv_heads": (~mask.kv_heads(shape)).nonzero().flatten().tolist(),
                    "channels": int((~mask.channels).sum()),
                }
                for index, (mask, shape) in enumerate(zip(self.masks.blocks, self.dense_shapes, strict=True))
            ],
            "shapes_before": [asdict(shape) for shape in self.dense_shapes],
            "shapes_after": [asdict(shape) for shape in self.shapes],
            "model_type": self.model_type,
            "dense": asdict(self.dense),
            "cut": asdict(self.cut),
            "engines": dict(self.engines),
        }


def plan_prune(checkpoint: Checkpoint, masks: Masks, length: int, memory_bytes: int) -> PrunePlan:
    """Derive the plan of a cut.

    Args:
        length: tokens per calibration row, at which the FLOPs of attention scores are counted.
        memory_bytes: estimated peak of the run, from `run_memory`.
    """
    cut = cut_checkpoint(checkpoint, masks)
    return PrunePlan(
        masks=masks,
        dense=size_of(checkpoint, length),
        cut=size_of(cut, length),
        dense_shapes=checkpoint.shapes,
        shapes=cut.shapes,
        model_type=cut.family.model_type,
        engines=engines(cut),
        memory_bytes=memory_bytes,
    )
