"""Architecture families as data: where a model's blocks are and which projections are coupled.

Each file in `families/` describes one family. Rows of the input projections and columns of the output projection
belong to the same unit, an attention head or a feed-forward channel, and are cut together:

    hidden ─▶ query (heads * head_dim, d_model)  ┐
    hidden ─▶ key   (kv_heads * head_dim, d_model)├─▶ heads ─▶ output (d_model, heads * head_dim) ─▶ + hidden
    hidden ─▶ value (kv_heads * head_dim, d_model)┘
    hidden ─▶ inputs (channels, d_model) ─▶ channels ─▶ output (d_model, channels) ─▶ + hidden

A family is `causal` (each token sees those before it, and the next one is predicted) or an `encoder` (each token sees
all of them).
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from spinecli.errors import UnsupportedFamilyError


class Task(str, Enum):
    """What a checkpoint was made to answer."""

    causal_lm = "causal-lm"
    """The next token, at every position."""
    masked_lm = "masked-lm"
    """The hidden token, at every position."""
    classification = "classification"
    """The label of the row."""
    encoding = "encoding"
    """Nothing: the last hidden states are the answer."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionGroup(_Data):
    """Names of the attention projections, relative to a block."""

    query: str
    key: str
    value: str
    output: str
    cuttable: bool
    """False where the plain format ties the head size to hidden_size / heads, so that no head can leave."""

    @property
    def projections(self) -> tuple[str, str, str, str]:
        """All four, inputs first."""
        return (self.query, self.key, self.value, self.output)


class FeedForwardGroup(_Data):
    """Names of the feed-forward projections, relative to a block."""

    inputs: tuple[str, ...]
    output: str


class ConfigKeys(_Data):
    """Which keys of config.json hold the sizes."""

    blocks: str
    heads: str
    kv_heads: str | None
    head_dim: str | None
    channels: str
    pre_norm: str | None = None
    """A boolean key that tells pre-norm from post-norm, where the family has both."""


class Stand(_Data):
    """The family that carries a head count which does not divide hidden_size, with bit-identical modules."""

    model_type: str
    set: dict[str, Any]
    drop: tuple[str, ...]
    unless_set: tuple[str, ...]
    """Config keys that the standing-in family cannot express: if one is truthy, it cannot stand in."""


class Family(_Data):
    """One architecture family."""

    model_type: str
    kind: Literal["causal", "encoder"]
    architecture: str
    """The language model: next-token of a causal family, masked of an encoder."""
    classification_architecture: str
    classification_head: str
    """Name of the classifying module in it."""
    bare_architecture: str | None = None
    """The encoder without any head; None for causal families."""
    blocks: str
    """Where the blocks are in a model with a head."""
    attention: AttentionGroup
    feed_forward: FeedForwardGroup
    config_keys: ConfigKeys
    post_norm: bool = False
    """A norm always stands behind each residual sum; see `ConfigKeys.pre_norm` where it depends."""
    positions_behind_padding: bool = False
    """Positions are counted from pad_token_id + 1, so that many fewer tokens fit."""
    required: dict[str, Any] = {}
    """Config keys that, if they are there, must hold these values: what the modules can do and spine cannot."""
    output_bias_switches: dict[str, str]
    """Config keys that give the output projections a bias: "attention", "feed_forward" -> key."""
    indivisible_heads: Stand | None
    narrow_heads: str | None = None
    """The `model_type` that carries fewer heads of the same size, where this one cannot."""
    modelling_file: str | None = None
    """The file that is shipped with a checkpoint because transformers does not know the family; else None."""
    gguf_architecture: str | None
    """What llama.cpp calls the family; None if it has no such architecture."""

    @property
    def projections(self) -> tuple[str, ...]:
        """All coupled projections of a block, relative to it: attention, then feed-forward."""
        return (*self.attention.projections, *self.feed_forward.inputs, self.feed_forward.output)

    @property
    def heads_can_leave(self) -> bool:
        """Whether a checkpoint with fewer heads can be written at all."""
        return self.attention.cuttable or self.narrow_heads is not None

    def architecture_of(self, task: Task) -> str:
        """The transformers class that does `task`; ValueError if the family has none."""
        found = {
            Task.causal_lm: self.architecture if self.kind == "causal" else None,
            Task.masked_lm: self.architecture if self.kind == "encoder" else None,
            Task.classification: self.classification_architecture,
            Task.encoding: self.bare_architecture,
        }[task]
        if found is None:
            raise ValueError(f"{self.model_type} has no architecture for {task.value}")
        return found


@cache
def families() -> dict[str, Family]:
    """All known families by `model_type`."""
    folder = resources.files("spinecli.checkpoints") / "families"
    found = [Family.model_validate_json(file.read_text(encoding="utf-8")) for file in folder.iterdir()]
    return {family.model_type: family for family in sorted(found, key=lambda family: family.model_type)}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; UnsupportedFamilyError with the list of known ones."""
    try:
        return families()[model_type]
    except KeyError:
        known = ", ".join(families())
        raise UnsupportedFamilyError(f"The model type {model_type!r} is not supported; spine knows {known}.") from None
