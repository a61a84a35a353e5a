"""A language model, a classifier or an encoder on disk, opened without loading it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from spinecli.checkpoints.family import Family, Task, family_of_config, task_of
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.skeleton import build_skeleton, stored_shapes
from spinecli.checkpoints.tensors import INDEX_FILE, SINGLE_FILE, TensorSource, held, read_json_object, stored_tensors
from spinecli.checkpoints.validation import Stored, aliases, check_sizes, check_token_ids
from spinecli.errors import DamagedCheckpointError, NotACheckpointError, reason_of

# What transformers and torch raise when a configuration's values make no model.
_CONFIG_ERRORS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
    StrictDataclassError,
)
_log = logging.getLogger(__name__)
_ADAPTER_CONFIG = "adapter_config.json"
_UNNAMED = "an unnamed method"
# How many tensors a note names.
_NAMED = 4


@dataclass(frozen=True)
class Checkpoint:
    """Configuration, family and tensor locations of a checkpoint; weights stay where they are until `read`."""

    path: Path
    """Where its tokenizer lies and what messages call it."""
    raw_config: dict[str, Any]
    config: PreTrainedConfig
    family: Family
    task: Task
    tensors: dict[str, TensorSource]
    """By the name the architecture gives them, whatever an old file calls them."""
    companions: Path | None = None
    """Where the companion files lie that are not the tokenizer's, if not at `path`."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open and validate: every tensor that the configuration asks for is there, with its shape.

        Raises: NotACheckpointError, UnsupportedFamilyError, DamagedCheckpointError, UnsafeFileError.
        """
        file = path / "config.json"
        weights = any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
        if (path / _ADAPTER_CONFIG).is_file() or not file.is_file():
            raise _no_checkpoint(path, file.is_file() and weights)
        raw_config = read_json_object(file)
        family = family_of_config(file, raw_config)
        task = task_of(file, family, raw_config)
        on_disk = stored_tensors(path)
        check_sizes(file, family, raw_config, on_disk)
        quantisation = _quantisation(raw_config)
        config, skeleton = _built(path, family, task, raw_config)
        stored = Stored(on_disk, skeleton.base_model_prefix + ".", quantisation, family.stored_name)
        ties = dict(skeleton.all_tied_weights_keys)
        if differing := stored.differing_ties(ties):
            raw_config = {**raw_config, "tie_word_embeddings": False}
            config, skeleton = _built(path, family, task, raw_config)
        matched = stored.match(path, stored_shapes(skeleton), ties, skeleton._tied_weights_keys or {})
        if differing:
            _log.warning(
                f"{path} stores {differing[0]} with values of its own although config.json ties it to "
                f"{ties[differing[0]]}; both are kept, as transformers does."
            )
        if unused := stored.unused(skeleton.state_dict()):
            _log.warning(
                f"{path} holds tensors that a {type(skeleton).__name__} does not use ({len(unused)}): "
                f"{', '.join(unused[:_NAMED])}{', ...' if len(unused) > _NAMED else ''}."
            )
        if quantisation is not None:
            _log.warning(
                f"{file} says that the weights are quantised by {quantisation}, but they are stored as they are; its "
                "quantization_config is left out."
            )
            raw_config = {key: value for key, value in raw_config.items() if key != "quantization_config"}
            config = config_from(raw_config)
        return cls(path, raw_config, config, family, task, dict(matched))

    def read(self, name: str) -> Tensor:
        """The tensor `name` in its stored dtype, checked for NaN and infinity."""
        return self.tensors[name].read()

    def skeleton(self) -> PreTrainedModel:
        """A model of this configuration with its parameters on the meta device."""
        return build_skeleton(self.config, self.task)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(getattr(self.config, self.family.config_keys.blocks))

    @property
    def blocks_path(self) -> str:
        """Where the blocks are in this model: `Family.blocks`, without the encoder's own name if it stands alone."""
        return self.family.blocks.partition(".")[2] if self.task is Task.encoding else self.family.blocks

    def block_prefix(self, index: int) -> str:
        """The prefix of block `index`'s tensors, ending in a dot."""
        return f"{self.blocks_path}.{index}."

    @property
    def labels(self) -> int | None:
        """Number of labels of a classifier; None for every other task."""
        return int(self.config.num_labels) if self.task is Task.classification else None

    @property
    def positions(self) -> int | None:
        """Longest row that the model has positions for; None if its configuration does not say."""
        count = getattr(self.config, "max_position_embeddings", None)
        if count is None or not self.family.positions_behind_padding:
            return count
        return int(count) - int(self.config.pad_token_id) - 1

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @cached_property
    def shapes(self) -> tuple[BlockShape, ...]:
        """The shape of every block, in their order."""
        if not self.config.is_heterogeneous:
            return (self._shape_of(self.config),) * self.blocks
        return tuple(self._shape_of(config) for config in self.config.per_layer_config)

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks have the same shape."""
        return len(set(self.shapes)) == 1

    @property
    def shape(self) -> BlockShape:
        """The shape that all blocks have; ValueError if they differ."""
        if not self.is_uniform:
            raise ValueError(f"the blocks of {self.path} differ in shape")
        return self.shapes[0]

    def _shape_of(self, config: PreTrainedConfig) -> BlockShape:
        """The shape of a block with this configuration."""
        keys = self.family.config_keys
        heads = int(getattr(config, keys.heads))
        kv_heads = int(getattr(config, keys.kv_heads)) if keys.kv_heads else heads
        head_dim = getattr(config, keys.head_dim, None) if keys.head_dim else None
        channels = int(getattr(config, keys.channels) or (keys.channels_per_width or 0) * self.d_model)
        skipped = getattr(config, "skip", ())
        if "attention" in skipped:
            heads = kv_heads = 0
        return BlockShape(heads, kv_heads, int(head_dim or self.d_model // heads), 0 if "mlp" in skipped else channels)

    @cached_property
    def attention_kinds(self) -> tuple[str, ...]:
        """What each block's attention is, where blocks differ in it: windows, global, without positions."""
        lists = [getattr(self.config, key, None) for key in self.family.block_lists]
        return tuple(", ".join(map(str, kinds)) for kinds in zip(*filter(None, lists), strict=True)) or (
            ("attention",) * self.blocks
        )

    @property
    def is_post_norm(self) -> bool:
        """True if a norm stands behind each residual sum instead of before each sub-layer."""
        key = self.family.config_keys.pre_norm
        return self.family.post_norm or (key is not None and not getattr(self.config, key))

    def block_names(self, index: int) -> dict[str, str]:
        """Tensor names of block `index`: relative name -> full name."""
        prefix = self.block_prefix(index)
        return {name.removeprefix(prefix): name for name in self.tensors if name.startswith(prefix)}

    def has(self, index: int, projection: str) -> bool:
        """Whether a block has the projection: always, unless its sub-layer was removed."""
        return f"{self.block_prefix(index)}{projection}.weight" in self.tensors

    def outer_names(self) -> list[str]:
        """Names of the tensors outside the blocks: embeddings, final norm, head."""
        return [name for name in self.tensors if not name.startswith(self.blocks_path + ".")]

    def groups(self) -> list[dict[str, TensorSource]]:
        """What is written together: the tensors outside the blocks, then those of each block."""
        names = [self.outer_names(), *(self.block_names(index).values() for index in range(self.blocks))]
        return [{name: self.tensors[name] for name in group} for group in names]

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype in which the blocks' matrices are stored."""
        outputs = (self.family.feed_forward.output, self.family.attention.output)
        names = self.block_names(0)
        return next(self.tensors[names[f"{name}.weight"]].dtype for name in outputs if f"{name}.weight" in names)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(stored.bytes for stored in self.tensors.values())


def _no_checkpoint(path: Path, weights: bool) -> NotACheckpointError:
    """What a directory is instead, as far as that can be told: an adapter, with or without `weights` beside it."""
    adapter = path / _ADAPTER_CONFIG
    if not adapter.is_file():
        return NotACheckpointError(f"{path} has no config.json; name a Hugging Face checkpoint directory.")
    base = read_json_object(adapter).get("base_model_name_or_path") or "a checkpoint that it does not name"
    if weights:
        return NotACheckpointError(
            f"{path} holds both a checkpoint and a PEFT adapter of {base}, which transformers would load instead; move "
            f"{_ADAPTER_CONFIG} and the adapter's weights elsewhere."
        )
    return NotACheckpointError(
        f"{path} is a PEFT adapter of {base}; name that checkpoint, and the adapter with --adapter of spine eval or "
        "spine export, which also merges it."
    )


def _built(
    path: Path, family: Family, task: Task, raw_config: dict[str, Any]
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The configuration and a model of it without weights; DamagedCheckpointError if its values make none."""
    try:
        config = config_from(raw_config)
        check_token_ids(path, config)
        return config, build_skeleton(config, task)
    except _CONFIG_ERRORS as error:
        reason = reason_of(error, -1)
        raise DamagedCheckpointError(
            f"{path / 'config.json'} is not a valid {family.model_type} configuration ({reason}); "
            "fetch the checkpoint again."
        ) from error


def _quantisation(raw_config: dict[str, Any]) -> str | None:
    """The method by which a configuration says that its weights are quantised."""
    if "quantization_config" not in raw_config:
        return None
    settings = raw_config["quantization_config"]
    return str(settings.get("quant_method", _UNNAMED)) if isinstance(settings, dict) else _UNNAMED


def config_from(raw_config: dict[str, Any]) -> PreTrainedConfig:
    """The transformers configuration of a config.json's content."""
    config_class = type(AutoConfig.for_model(raw_config["model_type"]))
    config: PreTrainedConfig = config_class.from_dict(raw_config)
    config.return_dict = True  # by name, whatever a checkpoint asks for
    config.torchscript = False
    return config


def fine_tuned(
    checkpoint: Checkpoint, task: Task, values: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> Checkpoint:
    """`checkpoint` as fine-tuning for `task` leaves it; it can be streamed, cut and written like any other.

    Args:
        values: tensors that differ from the checkpoint's, by their names in the model of `task`, uncut: projections
            with an adapter merged, the classifier. They are kept in memory, in the dtype of the checkpoint's blocks.
        settings: keys of config.json that differ, such as `id2label`.

    Raises: ValueError if a tensor of the model is neither in `values` nor in the checkpoint, or has another shape.
    """
    family = checkpoint.family
    raw_config = {**checkpoint.raw_config, **(settings or {}), "architectures": [family.architecture_of(task)]}
    config = config_from(raw_config)
    skeleton = build_skeleton(config, task)
    expected = stored_shapes(skeleton)
    if strangers := values.keys() - expected.keys():
        raise ValueError(f"{sorted(strangers)[0]} is no tensor of a {family.architecture_of(task)}")
    tensors: dict[str, TensorSource] = {}
    for name, shape in expected.items():
        known = [alias for alias in aliases(name, skeleton.base_model_prefix + ".") if alias in checkpoint.tensors]
        if name in values:
            tensors[name] = held(values[name].detach().to("cpu", checkpoint.storage_dtype))
        elif known:
            tensors[name] = checkpoint.tensors[known[0]]
        else:
            raise ValueError(f"neither the checkpoint nor fine-tuning has {name}")
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tensors[name].shape}, not {shape}")
    return replace(checkpoint, raw_config=raw_config, config=config, task=task, tensors=tensors)
