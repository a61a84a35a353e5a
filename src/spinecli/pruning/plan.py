"""What a prune run will do, before it does it: what leaves each block, the sizes after, and what the run will need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import ModelSize, model_size, size_of
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
    shapes = masks.shapes_after(checkpoint.shapes)
    family = written_family(checkpoint, shapes)
    return PrunePlan(
        masks=masks,
        dense=size_of(checkpoint, length),
        cut=model_size(checkpoint, dict(zip(masks.kept_blocks, shapes, strict=True)), length),
        dense_shapes=checkpoint.shapes,
        shapes=shapes,
        model_type=family.model_type,
        engines=engines(family, checkpoint.d_model, shapes),
        memory_bytes=memory_bytes,
    )


def engines(family: Family, d_model: int, shapes: Sequence[BlockShape]) -> dict[str, str]:
    """Which inference engines take blocks of these shapes; facts in docs/commands/prune.md."""
    found = {"transformers": "with trust_remote_code=True" if family.modelling_file else "yes"}
    if family.kind == "encoder":
        return found | {"llama.cpp": "not tried with encoders"}
    if family.gguf_architecture is None:
        return found | {"llama.cpp": f"no: it has no {family.model_type} architecture"}
    found["llama.cpp f16"] = "yes"
    widths = {d_model} | {width for shape in shapes for width in (shape.heads * shape.head_dim, shape.channels)}
    for name, multiple in (("llama.cpp Q8_0, Q4_0", 32), ("llama.cpp K-quants", 256)):
        ragged = sorted(width for width in widths if width % multiple)
        found[name] = f"no: {ragged[0]} is not a multiple of {multiple}" if ragged else "yes"
    return found
