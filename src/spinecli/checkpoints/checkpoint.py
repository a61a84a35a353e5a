"""A causal language model on disk, opened without loading it."""

from __future__ import annotations

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
        try:
            config = config_from(raw_config)
        except (TypeError, ValueError, KeyError, OSError, StrictDataclassError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise DamagedCheckpointError(
                f"{file} is not a valid {family.model_type} configuration: {reason}"
            ) from error
        on_disk = stored_tensors(path)
        expected = stored_shapes(build_skeleton(config))
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
