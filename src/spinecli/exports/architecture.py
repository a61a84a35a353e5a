"""llama.cpp's architectures as data: what it calls a family's tensors, and what it can carry.

Each file in `architectures/` describes one. `like` takes everything that the file leaves out from another file, and
`block` and `outer` only add to that file's.
"""

from __future__ import annotations

import json
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any

from pydantic import Field

from spinecli.artifacts.record import Record
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.errors import UnexportableError

_MERGED = ("outer", "block")


class Change(str, Enum):
    """What llama.cpp wants done to a tensor's values."""

    interleaved = "interleaved"
    """Rows of each head from halves to pairs, as its rotation of neighbouring rows asks for."""
    plus_one = "plus-one"
    """One added: a norm that multiplies by 1 + weight."""
    by_part = "by-part"
    """Rows of a fused projection from head after head to all queries, all keys, all values."""


class Architecture(Record):
    """One architecture of llama.cpp."""

    name: str
    outer: dict[str, str]
    """Modules outside the blocks -> llama.cpp's names."""
    block: dict[str, str]
    """Modules of a block, relative to it -> llama.cpp's names, relative to `blk.N`.

    A fused projection that is not named here is split: its parts are called `NAME.query`, `NAME.key` and `NAME.value`,
    or `NAME.0` and `NAME.1` of a feed-forward layer.
    """
    attention_norms: tuple[str, ...]
    """Norms of a block that are there for its attention alone, and leave with it."""
    feed_forward_norms: tuple[str, ...]
    """The same for its feed-forward layer."""
    changes: dict[str, Change] = Field(default_factory=dict)
    """By module."""
    biases: tuple[str, ...] = ()
    """Modules that may have one, norms of a block aside."""
    epsilon: str = "rms_norm_eps"
    """Key of config.json that holds the norms' epsilon."""
    epsilon_key: str = "attention.layer_norm_rms_epsilon"
    rotary: bool = True
    rope_scalings: tuple[str, ...] = ("default",)
    """Kinds of rotary scaling that it reads."""
    partial_rotation: bool = False
    """Less than a whole head may be turned."""
    sliding: bool = False
    """It slides attention windows, in the blocks that the file names."""
    settings: dict[str, str] = Field(default_factory=dict)
    """Further keys, relative to the architecture -> keys of config.json; absent and null ones are left out."""
    required: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Keys of config.json that must hold one of these values, if any: what its code takes as given."""
    needed: tuple[str, ...] = ()
    """Keys of config.json that must hold something."""
    refused: tuple[str, ...] = ()
    """Keys of config.json that must hold nothing."""
    head_dim_twins: tuple[str, ...] = ()
    """Keys of config.json that must hold the size of a head."""
    patterns: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Keys of config.json with a value per block -> what these must be, over and over."""
    refused_blocks: tuple[int, ...] = ()
    """Numbers of blocks by which it recognises a model that it scales in another way."""
    copied_head: bool = False
    """It wants an output head of its own where the embedding serves as one."""
    tied: bool = False
    """It takes the embedding for its output head, and no other."""
    float32: tuple[str, ...] = ()
    """Its names of matrices that it adds up, which must not be rounded."""
    per_block: bool = False
    """Sizes may differ from block to block, and sub-layers may be missing."""
    square_attention: bool = False
    """heads * head_dim must be the width of the residual stream."""
    fixed_heads: bool = False
    """No head of zeros can be put in."""
    differing: str | None = None
    """The architecture that computes the same and lets blocks differ."""
    narrow: str | None = None
    """The architecture that computes the same and takes any number of heads."""

    def target(self, module: str) -> str | None:
        """llama.cpp's name of a module of a block, relative to the block."""
        return self.block.get(module)


@cache
def architecture(name: str) -> Architecture:
    """The architecture that llama.cpp calls `name`; KeyError if there is no file for it."""
    return Architecture.model_validate(_described(name))


def _described(name: str) -> dict[str, Any]:
    file = resources.files("spinecli.exports") / "architectures" / f"{name}.json"
    if not file.is_file():
        raise KeyError(name)
    own: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "like" not in own:
        return own
    inherited = _described(own.pop("like"))
    joined = {key: {**inherited[key], **own.get(key, {})} for key in _MERGED}
    return {**inherited, **own, **joined}


def known_architectures() -> list[str]:
    """Names of all architectures that there is a file for."""
    folder = resources.files("spinecli.exports") / "architectures"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The architecture that carries a checkpoint's blocks as they are, or the nearest one, which zeros must fill up.

    Raises: UnexportableError.
    """
    family = checkpoint.family
    if checkpoint.task is not Task.causal_lm:
        raise UnexportableError(
            f"is for {checkpoint.task.value}, and --format gguf takes causal language models", checkpoint.path
        )
    if family.gguf_architecture is None or family.gguf_architecture not in known_architectures():
        raise UnexportableError(
            f"spine cannot write a {family.model_type} as GGUF", remedy="use --format hf, which other converters read"
        )
    found = architecture(family.gguf_architecture)
    shapes = checkpoint.shapes
    whole = all(shape.heads and shape.channels for shape in shapes)
    if found.differing and (len(set(shapes)) > 1 or not whole):
        return architecture(found.differing)
    if found.narrow and found.square_attention and shapes[0].heads * shapes[0].head_dim != checkpoint.d_model:
        return architecture(found.narrow)
    return found
