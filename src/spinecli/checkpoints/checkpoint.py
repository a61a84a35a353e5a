"""A causal language model on disk, opened without loading it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from spinecli.checkpoints.family import Family, family_of
from spinecli.checkpoints.reader import StoredTensor, read_json_object, read_tensor, stored_tensors
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.skeleton import build_skeleton, stored_shapes
from spinecli.errors import DamagedCheckpointError, NotACheckpointError

# What transformers and torch raise when a configuration's values make no model.
_CONFIG_ERRORS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    OSError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Checkpoint:
    """Configuration, family and tensor locations of a checkpoint; weights stay on disk until `read`."""

    path: Path
    raw_config: dict[str, Any]
    config: PreTrainedConfig
    family: Family
    tensors: dict[str, StoredTensor]
    """By the name the architecture gives them, which old files may lack a prefix of."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open and validate: every tensor that the configuration asks for is there, with its shape.

        Raises: NotACheckpointError, UnsupportedFamilyError, DamagedCheckpointError, UnsafeFileError.
        """
        file = path / "config.json"
        if not file.is_file():
            raise NotACheckpointError(f"{path} has no config.json; name a Hugging Face checkpoint directory.")
        raw_config = read_json_object(file)
        family = family_of(str(raw_config.get("model_type")))
        on_disk = stored_tensors(path)
        _check_sizes(file, family, raw_config, on_disk)
        try:
            config = config_from(raw_config)
            expected = stored_shapes(build_skeleton(config))
        except _CONFIG_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            raise DamagedCheckpointError(
                f"{file} is not a valid {family.model_type} configuration ({reason.rstrip('.')}); "
                "fetch the checkpoint again."
            ) from error
        return cls(path, raw_config, config, family, _match(path, expected, on_disk))

    def read(self, name: str) -> Tensor:
        """The tensor `name` in its stored dtype, checked for NaN and infinity."""
        return read_tensor(self.tensors[name])

    def skeleton(self) -> PreTrainedModel:
        """A model of this configuration with its parameters on the meta device."""
        return build_skeleton(self.config)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(getattr(self.config, self.family.config_keys.blocks))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @cached_property
    def shape(self) -> BlockShape:
        """The shape of every block."""
        keys = self.family.config_keys
        heads = int(getattr(self.config, keys.heads))
        kv_heads = int(getattr(self.config, keys.kv_heads)) if keys.kv_heads else heads
        head_dim = getattr(self.config, keys.head_dim, None) if keys.head_dim else None
        channels = int(getattr(self.config, keys.channels))
        return BlockShape(heads, kv_heads, int(head_dim or self.d_model // heads), channels)

    @property
    def is_post_norm(self) -> bool:
        """True if a norm stands behind each residual sum instead of before each sub-layer."""
        key = self.family.config_keys.pre_norm
        return key is not None and not getattr(self.config, key)

    def block_names(self, index: int) -> dict[str, str]:
        """Tensor names of block `index`: relative name -> full name."""
        prefix = self.family.block_prefix(index)
        return {name.removeprefix(prefix): name for name in self.tensors if name.startswith(prefix)}

    def outer_names(self) -> list[str]:
        """Names of the tensors outside the blocks: embeddings, final norm, head."""
        return [name for name in self.tensors if not name.startswith(self.family.blocks + ".")]

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype in which the blocks' matrices are stored."""
        output = self.family.block_prefix(0) + self.family.feed_forward.output + ".weight"
        return self.tensors[output].dtype

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(stored.bytes for stored in self.tensors.values())


def config_from(raw_config: dict[str, Any]) -> PreTrainedConfig:
    """The transformers configuration of a config.json's content."""
    config_class = type(AutoConfig.for_model(raw_config["model_type"]))
    config: PreTrainedConfig = config_class.from_dict(raw_config)
    return config


def _check_sizes(file: Path, family: Family, raw_config: dict[str, Any], on_disk: dict[str, StoredTensor]) -> None:
    """Refuse sizes that the weights on disk cannot have, before a model of such a size is built."""
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


def _match(
    path: Path, expected: dict[str, tuple[int, ...]], on_disk: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Pair the names that the architecture expects with the tensors on disk."""
    prefix = "" if any(name in on_disk for name in expected) else "model."
    matched = {}
    for name, shape in expected.items():
        stored = on_disk.get(name.removeprefix(prefix)) or on_disk.get(name)
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
