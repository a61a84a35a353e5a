"""Names of the tensors in messages: factors, folded changes, the head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spinecli.artifacts.seeding import torch_generator
from spinecli.lora.factors import Adapter, Factors, fresh_factors

LORA = "lora"
FOLDED = "folded"
_HEAD = "head."


def adapter_tensors(adapter: Adapter, kind: str = LORA) -> dict[str, Tensor]:
    """Factors as `lora.<projection>.a` and `.b`."""
    return {
        f"{kind}.{name}.{side}": value
        for name, factors in adapter.items()
        for side, value in (("a", factors.a), ("b", factors.b))
    }


def adapter_from(tensors: Mapping[str, Tensor], kind: str = LORA) -> dict[str, Factors]:
    """The factors in a message, in the message's order; KeyError if one of a pair is missing."""
    prefix = f"{kind}."
    names = [name[len(prefix) : -2] for name in tensors if name.startswith(prefix) and name.endswith(".a")]
    return {name: Factors(tensors[f"{prefix}{name}.a"], tensors[f"{prefix}{name}.b"]) for name in names}


def outputs_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Only B of every pair, where A is shared and stays at home."""
    return {f"{LORA}.{name}.b": factors.b for name, factors in adapter.items()}


def outputs_from(tensors: Mapping[str, Tensor], seed: int, d_in: Mapping[str, int]) -> dict[str, Factors]:
    """Pairs from a message of `outputs_tensors`, with A drawn as `shared_a` draws it."""
    prefix = f"{LORA}."
    outputs = {name[len(prefix) : -2]: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: Factors(shared_a(seed, name, b.shape[1], d_in[name]), b) for name, b in outputs.items()}


def shared_a(seed: int, name: str, rank: int, d_in: int) -> Tensor:
    """A (rank, d_in) of a projection, the same on the server and on every device."""
    return fresh_factors(1, d_in, rank, torch_generator(seed, "lora", name)).a


def head_tensors(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors as `head.<name>`."""
    return {_HEAD + name: value for name, value in head.items()}


def head_from(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head in a message."""
    return {name.removeprefix(_HEAD): value for name, value in tensors.items() if name.startswith(_HEAD)}
