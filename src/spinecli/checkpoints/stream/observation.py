"""Seeing what flows through a block: activations of its projections, and units silenced by a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.masks import BlockMask
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import LoadedBlock

Observer = Callable[[Tensor, Tensor], None]
"""Called with a projection's inputs (tokens, d_in) and outputs (tokens, d_out) of one chunk, in float32."""


@contextmanager
def observed(block: LoadedBlock, observers: Mapping[str, Observer]) -> Iterator[None]:
    """Call `observers[name]` whenever the projection `name` of the block runs; never, if the block has none."""
    with ExitStack() as stack:
        for name, observer in observers.items():
            if not block.has(name):
                continue

            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor, observer: Observer = observer) -> None:
                observer(inputs[0].flatten(0, -2).float(), output.flatten(0, -2).float())

            handle = block.linear(name).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


@contextmanager
def masked(block: LoadedBlock, family: Family, shape: BlockShape, mask: BlockMask) -> Iterator[None]:
    """Set the outputs of the removed heads and channels to zero while the context lasts.

    A sub-layer that loses its last unit adds nothing more, not even its bias.
    """
    keep = {
        family.attention.output: mask.heads.repeat_interleave(shape.head_dim),
        family.feed_forward.output: mask.channels,
    }
    with ExitStack() as stack:
        for name, units in keep.items():
            if not block.has(name):
                continue
            linear = block.linear(name)
            if not bool(units.any()):
                stack.callback(linear.register_forward_hook(_nothing).remove)
                continue
            factor = units.to(linear.weight.device, linear.weight.dtype)

            def hook(_: nn.Module, inputs: tuple[Any, ...], factor: Tensor = factor) -> tuple[Tensor]:
                return (inputs[0] * factor,)

            handle = linear.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def _nothing(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


class _Reached(Exception):  # noqa: N818
    """Leaves a block's forward pass at the projection whose inputs were wanted."""


@torch.no_grad()
def entering(block: LoadedBlock, name: str, hidden: Tensor, observers: Mapping[str, Observer] | None = None) -> Tensor:
    """What enters a projection; what lies behind the projection is not computed.

    Args:
        hidden: (rows, length, d_model) at the block's input, few enough rows to run together.
        observers: see what passes the projections on the way.

    Returns: (rows * length, d_in) in float32.
    """
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0].flatten(0, -2).float())
        raise _Reached

    handle = block.linear(name).register_forward_pre_hook(stop)
    try:
        with observed(block, observers or {}):
            block(hidden)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"block {block.index} never runs {name}")


class _Given(nn.Module):
    """Stands in an attention's place and gives what it would have given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """The output, and no attention weights."""
        return self._output, None


@contextmanager
def attention_given(block: LoadedBlock, projection: str, output: Tensor) -> Iterator[None]:
    """Let the attention give `output`, (rows, length, d_model), without computing it, while the context lasts.

    Args:
        projection: the attention's output projection, of a block of which `attention_is_whole` is true.
    """
    holder, attribute, attention = _attention(block, projection)
    setattr(holder, attribute, _Given(output.to(block.dtype)))
    try:
        yield
    finally:
        setattr(holder, attribute, attention)


@torch.no_grad()
def attention_is_whole(block: LoadedBlock, projection: str, hidden: Tensor) -> bool:
    """Whether the module that holds the output projection is the whole attention: it gives what the projection does,
    and weights.

    Args:
        hidden: a row or more at the block's input, (rows, length, d_model).
    """
    given: list[Any] = []
    projected: list[Tensor] = []
    handles = [
        _attention(block, projection)[2].register_forward_hook(lambda _, __, output: given.append(output)),
        block.linear(projection).register_forward_hook(lambda _, __, output: projected.append(output)),
    ]
    try:
        block(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return isinstance(given[0], tuple) and len(given[0]) == 2 and torch.equal(given[0][0], projected[0])


def _attention(block: LoadedBlock, projection: str) -> tuple[nn.Module, str, nn.Module]:
    """The module that holds a projection, and where it is: its own holder and its name there."""
    path = projection.rpartition(".")[0]
    holder, _, attribute = path.rpartition(".")
    return block.module.get_submodule(holder), attribute, block.module.get_submodule(path)
