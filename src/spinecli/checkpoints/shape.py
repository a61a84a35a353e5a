"""The width of a block: heads, KV heads, head size and feed-forward channels; and which heads may leave it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block. Query head `h` reads KV head `h // group_size`.

    A block without heads has lost its attention, one without channels its feed-forward layer.
    """

    heads: int
    kv_heads: int
    head_dim: int
    channels: int

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head; 1 where there are none."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    def __str__(self) -> str:
        heads = f"{self.heads} heads" if self.group_size == 1 else f"{self.heads} heads / {self.kv_heads} KV"
        return f"{heads}, {self.channels} channels"


class Heads(str, Enum):
    """Which heads may be cut."""

    auto = "auto"
    """Heads leave where the plain format can carry fewer of them."""
    cut = "cut"
    """Heads leave, even if the checkpoint must ship its modules for that."""
    keep = "keep"
    """All heads stay."""
