"""Whether a configuration and the tensors on disk belong together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.tensors import READABLE, StoredTensor, read_json_object
from spinecli.errors import DamagedCheckpointError

_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_sizes(file: Path, family: Family, raw_config: dict[str, Any], on_disk: dict[str, StoredTensor]) -> None:
    """Refuse sizes that the weights on disk cannot have, before a model of such a size is built.

    Raises: DamagedCheckpointError.
    """
    if family.positions_behind_padding and raw_config.get("pad_token_id", 0) is None:
        raise DamagedCheckpointError(
            f"{file} has no pad_token_id, after which {family.model_type} counts its positions; set it."
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
            raise DamagedCheckpointError(
                f"{file} has {key} {size!r}, not a positive number; fetch the checkpoint again."
            )
        if size > limits[key]:
            raise DamagedCheckpointError(
                f"{file} has {key} {size}, more than its weights have; the files do not belong together."
            )
    heads, kv_heads = sizes.get(keys.heads), sizes.get(keys.kv_heads) if keys.kv_heads else None
    if heads and kv_heads and heads % kv_heads:
        raise DamagedCheckpointError(
            f"{file} has {keys.heads} {heads}, not a multiple of {keys.kv_heads} {kv_heads}; fetch the checkpoint "
            "again."
        )


def check_token_ids(directory: Path, config: PreTrainedConfig) -> None:
    """Refuse special tokens for which the embedding has no row; with such a padding torch cannot even build a model.

    Raises: DamagedCheckpointError.
    """
    rows = int(config.vocab_size)
    generation = directory / "generation_config.json"
    named = [(directory / "config.json", key, getattr(config, key, None)) for key in _TOKEN_IDS]
    if generation.is_file():
        named += [(generation, key, read_json_object(generation).get(key)) for key in _TOKEN_IDS]
    for file, key, value in named:
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not -rows <= token < rows:
                raise DamagedCheckpointError(
                    f"{file} has {key} {token}, but the embedding has {rows} rows, numbered from 0; fix the file."
                )


@dataclass(frozen=True)
class Stored:
    """What of a checkpoint's files is the model's."""

    tensors: dict[str, StoredTensor]
    """By the names that files of the architecture have."""
    base_prefix: str
    """The base model's name in the architecture, with a dot; old files and bare encoders lack it."""
    quantisation: str | None
    """The method that config.json names, whether the tensors follow it or not."""
    stored_name: Callable[[str], str]
    """What files of the family call a tensor of the architecture."""

    def find(self, name: str) -> StoredTensor | None:
        """The tensor that the architecture calls `name`, whatever the file calls it."""
        known = (self.stored_name(name), *aliases(name, self.base_prefix))
        return next((self.tensors[alias] for alias in known if alias in self.tensors), None)

    def differing_ties(self, ties: Mapping[str, str]) -> list[str]:
        """Of the tensors that are to share another one's values, those that are stored with values of their own."""
        both = [(name, self.find(name), self.find(source)) for name, source in ties.items()]
        readable = [pair for pair in both if all(tensor and tensor.format in READABLE for tensor in pair[1:])]
        return [name for name, own, other in readable if own and other and not own.equals(other)]

    def match(
        self,
        path: Path,
        expected: Mapping[str, tuple[int, ...]],
        ties: Mapping[str, str],
        tieable: Iterable[str] = (),
    ) -> dict[str, StoredTensor]:
        """Pair the names that the architecture expects with the tensors on disk.

        Args:
            expected: name -> shape.
            ties: pairs of tensors that have the same values if only one of them is stored.
            tieable: tensors that a configuration may tie to others.

        Raises: DamagedCheckpointError.
        """
        partners: dict[str, list[str]] = {}
        for one, other in ties.items():
            partners.setdefault(one, []).append(other)
            partners.setdefault(other, []).append(one)
        matched = {}
        for name, shape in expected.items():
            candidates = (self.find(known) for known in (name, *partners.get(name, ())))
            stored = next((tensor for tensor in candidates if tensor), None)
            if stored is None:
                tie = ", or set tie_word_embeddings there if its head is the embedding"
                advice = tie if name in tieable and self.quantisation is None else ""
                raise DamagedCheckpointError(
                    f"{path} lacks the tensor {name} that its config.json asks for; {self._way_out()}{advice}."
                )
            if stored.format not in READABLE:
                raise DamagedCheckpointError(
                    f"{name} in {stored.file} is stored as {stored.format}, which is not a plain weight; "
                    f"{self._way_out('dequantise it first')}."
                )
            if stored.shape != shape:
                raise DamagedCheckpointError(
                    f"{name} in {stored.file} has shape {list(stored.shape)}, but config.json asks for {list(shape)}; "
                    "the files do not belong together."
                )
            matched[name] = stored
        return matched

    def unused(self, expected: Iterable[str]) -> list[str]:
        """Names in the files that the architecture has no use for."""
        used = {tensor.name for name in expected if (tensor := self.find(name))}
        return sorted(self.tensors.keys() - used)

    def _way_out(self, otherwise: str = "fetch the checkpoint again") -> str:
        if self.quantisation is None:
            return otherwise
        return f"dequantise the weights, which are quantised by {self.quantisation}, first"


def aliases(name: str, base_prefix: str) -> Iterator[str]:
    """What a file may call a tensor: its name, with or without the base model's prefix, and BERT's norms of old."""
    for prefixed in (name, name.removeprefix(base_prefix), base_prefix + name):
        yield prefixed
        yield prefixed.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
