"""The tensors of a block by the module that they belong to, weights as (d_out, d_in), fused projections split."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or some rows of one."""

    checkpoint: Checkpoint
    name: str
    transposed: bool
    """It is stored as (d_in, d_out)."""
    rows: tuple[int, int] | None
    """First and behind the last, after the transposition; None for all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """After transposition and cut."""
        shape = self.checkpoint.tensors[self.name].shape
        if self.transposed:
            shape = shape[::-1]
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    def read(self) -> Tensor:
        """The values."""
        value = self.checkpoint.read(self.name)
        if self.transposed:
            value = value.T
        return value if self.rows is None else value[slice(*self.rows)]


def block_modules(checkpoint: Checkpoint, index: int, whole: Collection[str]) -> dict[str, dict[str, Source]]:
    """Module of block `index` -> kind of tensor (weight, bias) -> where it comes from.

    Args:
        whole: fused projections that are not split.
    """
    family = checkpoint.family
    found: dict[str, dict[str, Source]] = {}
    for relative, name in checkpoint.block_names(index).items():
        module, _, kind = relative.rpartition(".")
        transposed = family.transposed and kind == "weight" and module in family.projections
        parts = {} if module in whole else _parts(checkpoint, index, module)
        pieces: dict[str, tuple[int, int] | None] = {**parts} or {module: None}
        for part, rows in pieces.items():
            found.setdefault(part, {})[kind] = Source(checkpoint, name, transposed, rows)
    return found


def _parts(checkpoint: Checkpoint, index: int, module: str) -> dict[str, tuple[int, int]]:
    """Rows of the parts of a fused projection that lie one below the other; empty for any other module."""
    attention, inputs = checkpoint.family.attention, checkpoint.family.feed_forward.inputs
    shape = checkpoint.shapes[index]
    if attention.fused == "by part" and module == attention.query:
        keys = shape.kv_heads * shape.head_dim
        sizes = {"query": shape.heads * shape.head_dim, "key": keys, "value": keys}
    elif inputs.count(module) > 1:
        sizes = {str(part): shape.channels for part in range(inputs.count(module))}
    else:
        return {}
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[f"{module}.{part}"] = (start, start + size)
        start += size
    return parts
