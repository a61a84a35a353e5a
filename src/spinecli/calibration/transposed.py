"""Projections that are stored transposed, made like everybody else's while a block is in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spinecli.checkpoints.family import Family


def with_linears(blocks: Sequence[nn.Module], family: Family) -> Sequence[nn.Module]:
    """Put a Linear in the place of every transposed projection, so that every family's weights are (d_out, d_in)."""
    for block in blocks if family.transposed else ():
        for name in family.projections:
            d_in, d_out = block.get_parameter(f"{name}.weight").shape
            holder, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(holder), attribute, nn.Linear(d_in, d_out, device="meta").requires_grad_(False))
    return blocks
