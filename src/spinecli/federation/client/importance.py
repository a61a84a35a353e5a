"""Importance of heads and channels from what local training computes anyway; no gradient of a frozen weight is needed.

Two scores, each smoothed over the local steps:

`lora`        LoRAPrune's form, from the factors' gradients (FedSpine, that it uses this very form is inferred)
`salience`    APT's form, activations times their gradients, with kurtosis
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from spinecli.checkpoints.cutting import attention_rows, channel_rows
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.local_pruning import Importance
from spinecli.federation.config import ScoreName

_SAME = 1e-6
"""Variance over the mean square below which float32 products count as all the same."""


class ImportanceScore(Protocol):
    """Watches local steps and keeps the smoothed importance of every unit."""

    importance: list[Importance]

    def watching(self) -> AbstractContextManager[None]:
        """A context around the local steps between two cuts."""

    def after_backward(self, masks: Masks) -> None:
        """Take in one step's gradients; a step with a NaN changes nothing."""


def smoothed(before: Importance, heads: Tensor, channels: Tensor, mask: BlockMask, keep: float) -> Importance:
    """`keep` times the old score plus the rest times the new one, for the units still there.

    Args:
        heads: (kept heads,), channels: (kept channels,): this step's scores. The first step's scores are taken whole.
    """

    def mixed(old: Tensor, new: Tensor, present: Tensor) -> Tensor:
        if not bool(torch.isfinite(new).all()):
            return old
        result = old.clone()
        result[present] = new if not bool(old.any()) else keep * old[present] + (1 - keep) * new
        return result

    return Importance(mixed(before.heads, heads, mask.heads), mixed(before.channels, channels, mask.channels))


def lora_sensitivity(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float) -> Tensor:
    """S = | (gB A + B gA - gB gA) * (W + c B A) |, the shape of W (d_out, d_in).

    The bracket is what B A changes by under one unit step of gradient descent, sign flipped; it stands in for dL/dW.
    Source: LoRAPrune's released code; in FedSpine inferred, see docs/algorithms/fedspine.md.
    """
    change = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return (change * torch.addmm(weight.float(), b, a, alpha=scale)).abs()


class LoraSensitivity:
    """LoRAPrune's score, summed over the projections that share a unit, each normalised to length one.

    Args:
        importance: what earlier rounds left, by block.
        keep: share of the old score in each step, 0.9 in LoRAPrune's code.
    """

    def __init__(self, base: BaseModel, importance: Sequence[Importance], keep: float = 0.9) -> None:
        self._base = base
        self._keep = keep
        self.importance = list(importance)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Gradients of the factors are all it needs, and they are there after the backward pass."""
        yield

    @torch.no_grad()
    def after_backward(self, masks: Masks) -> None:
        """Take in one step's gradients."""
        attention, feed_forward = self._base.family.attention, self._base.family.feed_forward
        head_inputs = (attention.query, attention.key, attention.value)
        for index, mask in enumerate(masks.blocks):
            shape = mask.shape_after(self._base.checkpoint.shapes[index])
            heads, channels = torch.zeros(shape.heads), torch.zeros(shape.channels)
            units = {name: self._units(index, name, 0) for name in {*head_inputs, *feed_forward.inputs}}
            for name, rows in zip(head_inputs, attention_rows(attention, shape), strict=True):
                if (unit := units[name]) is not None:
                    score = unit[rows].sum(dim=1)
                    heads += _normalised(score.repeat_interleave(len(heads) // len(score)))
            if (unit := self._units(index, attention.output, 1)) is not None:
                heads += _normalised(unit.view(-1, shape.head_dim).sum(dim=1))
            for name, rows in zip(feed_forward.inputs, channel_rows(feed_forward, shape), strict=True):
                if (unit := units[name]) is not None:
                    channels += _normalised(unit[rows])
            if (unit := self._units(index, feed_forward.output, 1)) is not None:
                channels += _normalised(unit)
            self.importance[index] = smoothed(self.importance[index], heads, channels, mask, self._keep)

    def _units(self, block: int, relative: str, axis: int) -> Tensor | None:
        """Sums of S over rows (axis 0) or columns (axis 1) of a projection; None if it carries no factors."""
        projection = self._base.projection(block, relative)
        a, b = projection.a, projection.b
        if a is None or b is None or b.grad is None:
            return None
        grad_a = a.grad if a.grad is not None else torch.zeros_like(a)
        score = lora_sensitivity(projection.weight, a, b, grad_a, b.grad, projection.scale)
        units: Tensor = score.sum(dim=1 - axis).cpu()
        return units


def _normalised(score: Tensor) -> Tensor:
    normalised: Tensor = score / (score.norm() + 1e-8)
    return normalised


class Salience:
    """APT's score: activations times gradients of what a unit hands to its output projection, plus kurtosis.

        S~_j = sum |dL/dH_j| * sum |H_j|        both sums over the batch first
        S_j  = S~_j / mean S~ + sqrt(Kurt(W_:j o X_j))

    Dividing by the block's mean is this project's: the two terms have different units. Source of the rest: APT.

    Args:
        importance: what earlier rounds left, by block.
        keep: share of the old score in each step, 0.85 in APT's code.
    """

    def __init__(self, base: BaseModel, importance: Sequence[Importance], keep: float = 0.85) -> None:
        self._base = base
        self._keep = keep
        self.importance = list(importance)
        self._outputs = (base.family.attention.output, base.family.feed_forward.output)
        self._activity: dict[tuple[int, str], Tensor] = {}
        self._kurtosis: dict[tuple[int, str], Tensor] = {}
        self._gradient: dict[tuple[int, str], Tensor] = {}
        self._weight_moments: dict[tuple[int, str], tuple[Tensor, Moments]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the inputs of the output projections, for as long as the context lasts."""
        handles = [
            self._base.projection(index, relative).register_forward_pre_hook(self._observer(index, relative))
            for index in range(self._base.checkpoint.blocks)
            for relative in self._outputs
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _observer(self, index: int, relative: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        projection = self._base.projection(index, relative)

        def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            hidden = arguments[0]
            # before the first projection that is trained, nothing else would ask for this gradient
            hidden.requires_grad_()
            key = (index, relative)
            flat = hidden.detach().flatten(0, -2).float()
            self._activity[key] = flat.abs().sum(dim=0)
            self._kurtosis[key] = product_kurtosis(moments(flat), self._moments_of(key, projection.weight))

            def keep_gradient(gradient: Tensor) -> None:
                self._gradient[key] = gradient.detach().flatten(0, -2).float().abs().sum(dim=0)

            hidden.register_hook(keep_gradient)  # type: ignore[no-untyped-call]

        return observe

    def _moments_of(self, key: tuple[int, str], weight: Tensor) -> Moments:
        """A frozen weight's moments, computed once until a cut replaces the weight."""
        known = self._weight_moments.get(key)
        if known is None or known[0] is not weight:
            known = self._weight_moments[key] = (weight, moments(weight.float()))
        return known[1]

    @torch.no_grad()
    def after_backward(self, masks: Masks) -> None:
        """Take in one step's activations and gradients; blocks that saw no backward pass keep their scores."""
        head_dim = self._base.checkpoint.shapes[0].head_dim
        for index, mask in enumerate(masks.blocks):
            keys = [(index, relative) for relative in self._outputs]
            if any(key not in self._gradient for key in keys):
                continue
            attention, feed_forward = (self._scores(key) for key in keys)
            heads = attention.view(-1, head_dim).sum(dim=1)
            self.importance[index] = smoothed(self.importance[index], heads, feed_forward, mask, self._keep)
        self._gradient.clear()

    def _scores(self, key: tuple[int, str]) -> Tensor:
        salience = self._gradient[key] * self._activity[key]
        return (salience / salience.mean().clamp_min(1e-30) + self._kurtosis[key].sqrt()).cpu()


Moments = tuple[Tensor, Tensor, Tensor, Tensor]
"""The first four raw moments of every column, (columns,) float64 each."""


def moments(values: Tensor) -> Moments:
    """Moments of every column of values (rows, columns), divided by its largest magnitude first; zeros stay zeros."""
    # kurtosis does not depend on scale, and powers of small numbers would vanish
    largest = values.abs().amax(dim=0)
    scaled = values / largest.where(largest > 0, 1.0)
    squared = scaled * scaled
    first, second = _mean(scaled), _mean(squared)
    return first, second, _mean(squared * scaled), _mean(squared * squared)


def product_kurtosis(inputs: Moments, weight: Moments) -> Tensor:
    """Kurtosis of the products W_ij X_tj over all i and t, for every j: (d_in,) float32. 0 where they are all the same.

    Args:
        inputs: moments of X (tokens, d_in), weight: of W (d_out, d_in).

    The moments of a product over the full grid factorise, so no grid is formed.
    """
    first, second, third, fourth = (x * w for x, w in zip(inputs, weight, strict=True))
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    varied = variance > _SAME * second
    return torch.where(varied, central / variance.where(varied, 1.0) ** 2, 0.0).clamp_min(0).float()


def _mean(values: Tensor) -> Tensor:
    # torch sums float32 in a cascade, which is exact enough here and several times faster than widening every value
    return values.mean(dim=0).double()


SCORES: dict[ScoreName, type[LoraSensitivity] | type[Salience]] = {"lora": LoraSensitivity, "salience": Salience}
