"""Which units of a checkpoint are kept: one mask per block over its query heads and its channels.

Masks are numbered by the checkpoint they were made for (the dense one), so block 7 stays block 7 when blocks before it
leave. Heads of a removed block are all False.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import DamagedArtifactError, ForeignArtifactError

MASKS_NAME = "masks.safetensors"


@dataclass(frozen=True, eq=False)
class BlockMask:
    """What is kept of one block."""

    heads: Tensor
    """(heads,) bool: kept query heads. A KV head is kept while any of its query heads is."""
    channels: Tensor
    """(channels,) bool: kept feed-forward channels."""

    @property
    def kept(self) -> bool:
        """False if the whole block is removed."""
        return bool(self.heads.any()) or bool(self.channels.any())

    def kv_heads(self, shape: BlockShape) -> Tensor:
        """(kv_heads,) bool: kept KV heads of a block that had `shape`."""
        return self.heads.view(shape.kv_heads, shape.group_size).any(dim=1) if shape.kv_heads else self.heads

    def shape_after(self, shape: BlockShape) -> BlockShape:
        """The shape that a block of `shape` has after the cut."""
        return BlockShape(
            heads=int(self.heads.sum()),
            kv_heads=int(self.kv_heads(shape).sum()),
            head_dim=shape.head_dim,
            channels=int(self.channels.sum()),
        )


@dataclass(frozen=True, eq=False)
class Masks:
    """One mask per block of the dense checkpoint."""

    blocks: tuple[BlockMask, ...]

    @classmethod
    def full(cls, shapes: Sequence[BlockShape]) -> Masks:
        """Masks that keep everything of blocks of these shapes."""
        return cls(
            tuple(
                BlockMask(torch.ones(shape.heads, dtype=torch.bool), torch.ones(shape.channels, dtype=torch.bool))
                for shape in shapes
            )
        )

    @property
    def kept_blocks(self) -> list[int]:
        """Dense indices of the blocks that stay, rising."""
        return [index for index, mask in enumerate(self.blocks) if mask.kept]

    @property
    def removed_blocks(self) -> list[int]:
        """Dense indices of the blocks that leave, rising."""
        return [index for index, mask in enumerate(self.blocks) if not mask.kept]

    def uniform_shape(self, shape: BlockShape) -> BlockShape:
        """The one shape that all kept blocks of `shape` have after the cut; ValueError if there is no such shape."""
        shapes = set(self.shapes_after((shape,) * len(self.blocks)))
        if len(shapes) != 1:
            raise ValueError(f"blocks differ in shape: {sorted(map(str, shapes))}")
        return shapes.pop()

    def shapes_after(self, shapes: Sequence[BlockShape]) -> tuple[BlockShape, ...]:
        """The shapes that the kept blocks have after the cut, in their order, from those of all blocks before it."""
        return tuple(self.blocks[index].shape_after(shapes[index]) for index in self.kept_blocks)

    def fit(self, shapes: Sequence[BlockShape]) -> bool:
        """Whether these masks were made for blocks of these shapes."""
        sizes = [(len(mask.heads), len(mask.channels)) for mask in self.blocks]
        return sizes == [(shape.heads, shape.channels) for shape in shapes]

    def save(self, directory: Path) -> None:
        """Write `masks.safetensors`."""
        tensors = {"blocks": torch.tensor([mask.kept for mask in self.blocks])}
        for index, mask in enumerate(self.blocks):
            tensors[f"block.{index}.heads"] = mask.heads.clone()
            tensors[f"block.{index}.channels"] = mask.channels.clone()
        save_file(tensors, directory / MASKS_NAME)

    @classmethod
    def load(cls, directory: Path) -> Masks:
        """Read `masks.safetensors`; ForeignArtifactError if absent, DamagedArtifactError if unreadable."""
        path = directory / MASKS_NAME
        if not path.is_file():
            raise ForeignArtifactError(f"{directory} has no {MASKS_NAME}; name a directory that spine prune wrote.")
        try:
            tensors = load_file(path)
            count = len(tensors["blocks"])
            blocks = (
                BlockMask(tensors[f"block.{index}.heads"].bool(), tensors[f"block.{index}.channels"].bool())
                for index in range(count)
            )
            return cls(tuple(blocks))
        except (SafetensorError, KeyError, TypeError) as error:
            raise DamagedArtifactError(f"{path} is damaged; prune again.") from error
