"""The interface of a pruning method: it scores the units of one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import LoadedBlock
from spinecli.pruning.elimination import eliminate

# Up to this width a Gram matrix is summed in float64; above it, its size matters more than its last digits.
_DOUBLE_WIDTH = 4096
GRAM_CHUNK = 1024
"""Tokens whose products are summed in float32 before they are added to a Gram matrix."""
_STRIPS = 8
_STRIPPED_WIDTH = 512


def gram_precision(width: int) -> torch.dtype:
    """In which dtype the Gram matrix of so many inputs is kept."""
    return torch.float64 if width <= _DOUBLE_WIDTH else torch.float32


def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add XᵀX of a chunk to a Gram matrix (d_in, d_in), in place.

    Only strips at and above the diagonal are multiplied; the rest is their mirror image.

    Args:
        inputs: X, (tokens, d_in) float32.
    """
    width = len(gram)
    if width <= _STRIPPED_WIDTH:
        gram += inputs.T @ inputs
        return
    strip = -(-width // _STRIPS)
    for start in range(0, width, strip):
        stop = min(start + strip, width)
        product = inputs[:, start:stop].T @ inputs[:, start:]
        gram[start:stop, start:] += product
        gram[stop:, start:stop] += product[:, stop - start :].T


class InputStatistics:
    """Sums over the calibration tokens that enter one projection Y = X Wᵀ.

    Args:
        width: d_in of the projection.
        gram: also accumulate the Gram matrix of the inputs.
    """

    def __init__(self, width: int, *, gram: bool = False) -> None:
        self.tokens = 0
        self.square_sum = torch.zeros(width, dtype=torch.float64)
        """(d_in,) sum of squares of each input."""
        self.sum = torch.zeros(width, dtype=torch.float64)
        """(d_in,) sum of each input."""
        self.output_square_sum = 0.0
        """Squared Frobenius norm of Y."""
        self.gram: Tensor | None = None
        """(d_in, d_in) Xᵀ X, if asked for."""
        if gram:
            self.gram = torch.zeros(width, width, dtype=gram_precision(width))

    def observe(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add a chunk: inputs (tokens, d_in), outputs (tokens, d_out)."""
        precise = inputs.detach().to("cpu", torch.float64)
        self.tokens += len(precise)
        self.square_sum += precise.square().sum(dim=0)
        self.sum += precise.sum(dim=0)
        self.output_square_sum += float(outputs.detach().double().square().sum())
        if self.gram is not None:
            single = inputs.detach().to("cpu", torch.float32)  # a sum of squares in half precision overflows
            for chunk in torch.split(single, GRAM_CHUNK):
                add_gram(self.gram, chunk)

    @property
    def required_gram(self) -> Tensor:
        """The Gram matrix; ValueError if it was not asked for."""
        if self.gram is None:
            raise ValueError("the Gram matrix was not accumulated")
        return self.gram

    @property
    def norms(self) -> Tensor:
        """(d_in,) L2 norm of each input over the tokens."""
        return self.square_sum.sqrt()

    @property
    def variances(self) -> Tensor:
        """(d_in,) unbiased variance of each input over the tokens."""
        mean = self.sum / self.tokens
        return (self.square_sum - self.tokens * mean.square()).clamp_min(0) / max(1, self.tokens - 1)


class BlockInfluence:
    """How much a block turns the hidden states: 1 - mean cosine between its inputs and outputs.

    ShortGPT's block influence; that COMP ranks layers by it is inferred, see docs/algorithms/comp.md.
    """

    def __init__(self) -> None:
        self._cosines = 0.0
        self._tokens = 0

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Add a chunk: hidden states (rows, length, d_model) before and after the block."""
        cosines = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        self._cosines += float(cosines.sum())
        self._tokens += cosines.numel()

    @property
    def value(self) -> float:
        """From 0 (the block only rescales) to 2."""
        return 1.0 - self._cosines / self._tokens


@dataclass(frozen=True, eq=False)
class BlockView:
    """What a method sees of a block: its weights, and its projections' calibration inputs."""

    block: LoadedBlock
    family: Family
    shape: BlockShape
    attention_inputs: InputStatistics
    """Of the attention output projection: heads * head_dim wide."""
    feed_forward_inputs: InputStatistics
    """Of the feed-forward output projection: channels wide."""

    @property
    def index(self) -> int:
        """The block's number, from 0."""
        return self.block.index

    def weight(self, name: str) -> Tensor:
        """A projection's weight, (d_out, d_in), by its name relative to the block."""
        return self.block.linear(name).weight.detach()

    @property
    def attention_output(self) -> Tensor:
        """Weight of the attention output projection, (d_model, heads * head_dim)."""
        return self.weight(self.family.attention.output)

    @property
    def feed_forward_output(self) -> Tensor:
        """Weight of the feed-forward output projection, (d_model, channels)."""
        return self.weight(self.family.feed_forward.output)


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Importance of a block's units; only the order inside each vector counts at uniform widths."""

    kv_groups: Tensor
    """(kv_heads,) float64, higher = keep."""
    channels: Tensor
    """(channels,) float64, higher = keep."""
    kv_group_errors: Tensor | None = None
    """(kv_heads + 1,) float64: squared output error after the least important n have left; None if unknown."""
    channel_errors: Tensor | None = None
    """(channels + 1,) float64."""


class Method(Protocol):
    """How a pruning method ranks units, and what it may cut."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def needs_gram(self) -> bool:
        """Whether `score` reads the Gram matrices."""

    @property
    def cuts_blocks(self) -> bool:
        """Whether whole blocks may leave."""

    @property
    def cuts_units(self) -> bool:
        """Whether heads and channels may leave."""

    @property
    def refits(self) -> bool:
        """Whether what stays is fitted to the dense model's outputs as part of the cut."""

    def score(self, view: BlockView) -> UnitScores:
        """Importance of every unit of one block."""


def score_by_neurons(view: BlockView, metric: Callable[[Tensor, InputStatistics], Tensor]) -> UnitScores:
    """Rank units by their neurons, the inputs of the two output projections; a head counts the sum of its neurons.

    Args:
        metric: weight (d_out, d_in) and statistics of the inputs -> (d_in,) importance.
    """
    groups = by_kv_group(metric(view.attention_output, view.attention_inputs), view.shape)
    return UnitScores(groups, metric(view.feed_forward_output, view.feed_forward_inputs))


def by_kv_group(neuron_scores: Tensor, shape: BlockShape) -> Tensor:
    """Sum scores of an attention output projection's inputs: (heads * head_dim,) -> (kv_heads,)."""
    return neuron_scores.view(shape.kv_heads, shape.group_size * shape.head_dim).sum(dim=1)


def score_by_elimination(view: BlockView) -> UnitScores:
    """Rank units by metric M4: how long each survives while the others compensate for those that leave."""
    shape = view.shape
    groups = channels = None
    if shape.heads:
        width = shape.group_size * shape.head_dim
        groups = eliminate(view.attention_output, view.attention_inputs.required_gram, width)
    if shape.channels:
        channels = eliminate(view.feed_forward_output, view.feed_forward_inputs.required_gram, 1)
    none = torch.zeros(0, dtype=torch.float64)
    return UnitScores(
        groups.order if groups else none,
        channels.order if channels else none,
        groups.errors if groups else torch.zeros(1, dtype=torch.float64),
        channels.errors if channels else torch.zeros(1, dtype=torch.float64),
    )


def unscored(shape: BlockShape) -> UnitScores:
    """Scores of a method that cuts no units: all equal."""
    return UnitScores(torch.ones(shape.kv_heads).double(), torch.ones(shape.channels).double())


@dataclass(frozen=True)
class BlocksAlone:
    """Measures how much blocks count, and leaves their units to others."""

    name: str = "blocks alone"
    needs_gram: bool = False
    cuts_blocks: bool = True
    cuts_units: bool = False
    refits: bool = False

    def score(self, view: BlockView) -> UnitScores:
        """Units are not ranked."""
        return unscored(view.shape)
