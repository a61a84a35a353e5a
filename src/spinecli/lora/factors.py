"""The two factors that LoRA adds to a projection, and sets of them.

Everything outside a training loop uses factors with the scale alpha / rank folded into B, so that the change of the
weight is B A and nothing else, whatever ranks the devices train with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.checkpoints.family import Family
from spinecli.errors import OptionError


@dataclass(frozen=True, eq=False)
class Factors:
    """The change B A of one projection's weight."""

    a: Tensor
    """(rank, d_in)."""
    b: Tensor
    """(d_out, rank), with alpha / rank folded in."""

    @property
    def rank(self) -> int:
        """Inner width; the product's true rank may be lower."""
        return self.a.shape[0]

    @property
    def bytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes

    def product(self) -> Tensor:
        """The dense change of the weight, (d_out, d_in)."""
        return self.b @ self.a

    def truncated(self, rank: int) -> Factors:
        """The first `rank` rows of A and columns of B (HETLoRA's truncation)."""
        return Factors(self.a[:rank], self.b[:, :rank])


Adapter = Mapping[str, Factors]
"""Factors by the full name of the projection, for example `model.layers.3.self_attn.q_proj`."""


def fresh_factors(d_out: int, d_in: int, rank: int, generator: torch.Generator) -> Factors:
    """Factors whose product is zero: A uniform in +-1/sqrt(d_in), B zero (PEFT's initialisation)."""
    a = (torch.rand(rank, d_in, generator=generator) * 2 - 1) / d_in**0.5
    return Factors(a, empty_b(d_out, rank))


def empty_b(d_out: int, rank: int) -> Tensor:
    """The B that makes any A change nothing, (d_out, rank)."""
    return torch.zeros(d_out, rank)


def target_projections(family: Family, selection: str = "all") -> tuple[str, ...]:
    """Names of the adapted projections relative to a block, in the family's order.

    Args:
        selection: `all`, `attention`, `query-value`, or the projections' own names separated by commas. The last part
            of a name will do if no other projection shares it.

    Raises: OptionError if a name is none of the family's projections, or if LoRA does not fit them.
    """
    if family.transposed:
        raise OptionError(
            f"{family.model_type} stores its projections transposed (d_in, d_out), which neither LoRA nor split "
            "training supports here; fine-tune a model of another family."
        )
    attention, everything = family.attention, family.projections
    named = {
        "all": everything,
        "attention": attention.projections,
        "query-value": tuple(dict.fromkeys((attention.query, attention.value))),
    }
    if selection in named:
        return named[selection]
    endings = Counter(name.rpartition(".")[2] for name in everything)
    unique = {name.rpartition(".")[2]: name for name in everything if endings[name.rpartition(".")[2]] == 1}
    short = unique | {name: name for name in everything}
    wanted = {part.strip() for part in selection.split(",")}
    if unknown := sorted(wanted - short.keys()):
        raise OptionError(
            f"--targets names {unknown[0]!r}, which is not a projection of {family.model_type}; "
            f"take all, attention, query-value, or some of {', '.join(everything)}."
        )
    chosen = {short[name] for name in wanted}
    return tuple(name for name in everything if name in chosen)
