"""Which rows of a block's input projections belong to which unit, also where several projections are fused into one.

Separate projections have a matrix each. Of fused ones, the rows lie in one matrix in one of two ways:

    by part:  q0 q1 q2 q3 │ k0 k1 │ v0 v1
    by head:  q0 k0 v0 │ q1 k1 v1 │ q2 k2 v2 │ q3 k3 v3
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinecli.checkpoints.family import AttentionGroup, FeedForwardGroup
from spinecli.checkpoints.shape import BlockShape


def attention_rows(attention: AttentionGroup, shape: BlockShape) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the projections named query, key and value, by head.

    Returns: (heads, head_dim), (kv_heads, head_dim) and (kv_heads, head_dim) int64.
    """
    query = torch.arange(shape.heads * shape.head_dim).view(shape.heads, shape.head_dim)
    key = torch.arange(shape.kv_heads * shape.head_dim).view(shape.kv_heads, shape.head_dim)
    if attention.fused == "by head":
        every = torch.arange(3 * query.numel()).view(shape.heads, 3, shape.head_dim)
        return every[:, 0], every[:, 1], every[:, 2]
    if attention.fused == "by part":
        return query, query.numel() + key, query.numel() + key.numel() + key
    return query, key, key


def channel_rows(feed_forward: FeedForwardGroup, shape: BlockShape) -> tuple[Tensor, ...]:
    """Rows of the feed-forward input projections by channel, one (channels,) int64 for each of `inputs`."""
    seen = dict.fromkeys(feed_forward.inputs, 0)
    found = []
    for name in feed_forward.inputs:
        found.append(torch.arange(shape.channels) + seen[name] * shape.channels)
        seen[name] += 1
    return tuple(found)
