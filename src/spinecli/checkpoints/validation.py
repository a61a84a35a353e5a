"""Whether a configuration and the tensors on disk belong together."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.reader import StoredTensor
from spinecli.errors import DamagedCheckpointError


def check_sizes(file: Path, family: Family, raw_config: dict[str, Any], on_disk: dict[str, StoredTensor]) -> None:
    """Refuse sizes that the weights on disk cannot have, before a model of such a size is built.

    Raises: DamagedCheckpointError.
    """
    if family.positions_behind_padding and raw_config.get("pad_token_id", 0) is None:
        raise DamagedCheckpointError(
            f"{file} has no pad_token_id, behind which {family.model_type} counts its positions; set it."
        )
    keys = family.config_keys
    longest = max((size for stored in on_disk.values() for size in stored.shape), default=0)
    limits = dict.fromkeys(
        (keys.heads, keys.kv_heads, keys.head_dim, keys.channels, "hidden_size", "vocab_size"), longest
    )
    limits |= {keys.blocks: len(on_disk), "max_position_embeddings": sys.maxsize}
    sizes = {key: raw_config[key] for key in limits if key is not None and raw_config.get(key) is not None}
    for key, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise DamagedCheckpointError(f"{file} has {key} {size!r}, no positive number; fetch the checkpoint again.")
        if size > limits[key]:
            raise DamagedCheckpointError(
                f"{file} has {key} {size}, more than its weights have; the files do not belong together."
            )
    heads, kv_heads = sizes.get(keys.heads), sizes.get(keys.kv_heads) if keys.kv_heads else None
    if heads and kv_heads and heads % kv_heads:
        raise DamagedCheckpointError(
            f"{file} has {keys.heads} {heads}, no multiple of {keys.kv_heads} {kv_heads}; fetch the checkpoint again."
        )


def match_tensors(
    path: Path, expected: dict[str, tuple[int, ...]], on_disk: dict[str, StoredTensor], base_prefix: str
) -> dict[str, StoredTensor]:
    """Pair the names that the architecture expects with the tensors on disk.

    Args:
        base_prefix: the base model's name in the architecture, with a dot; old files and bare encoders lack it.

    Raises: DamagedCheckpointError.
    """
    matched = {}
    for name, shape in expected.items():
        stored = next((on_disk[alias] for alias in aliases(name, base_prefix) if alias in on_disk), None)
        if stored is None:
            raise DamagedCheckpointError(
                f"{path} lacks the tensor {name} that its config.json asks for; fetch the checkpoint again."
            )
        if stored.shape != shape:
            raise DamagedCheckpointError(
                f"{name} in {stored.file} has shape {list(stored.shape)}, but config.json asks for {list(shape)}; "
                "the files do not belong together."
            )
        matched[name] = stored
    return matched


def aliases(name: str, base_prefix: str) -> Iterator[str]:
    """What a file may call a tensor: its name, with or without the base model's prefix, and BERT's norms of old."""
    for prefixed in (name, name.removeprefix(base_prefix), base_prefix + name):
        yield prefixed
        yield prefixed.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
