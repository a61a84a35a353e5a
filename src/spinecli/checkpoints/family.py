"""Architecture families as data: where a model's blocks are and which projections are coupled.

Each file in `families/` describes one family. Rows of the input projections and columns of the output projection
belong to the same unit, an attention head or a feed-forward channel, and are cut together:

    hidden ─▶ query (heads * head_dim, d_model)  ┐
    hidden ─▶ key   (kv_heads * head_dim, d_model)├─▶ heads ─▶ output (d_model, heads * head_dim) ─▶ + hidden
    hidden ─▶ value (kv_heads * head_dim, d_model)┘
    hidden ─▶ inputs (channels, d_model) ─▶ channels ─▶ output (d_model, channels) ─▶ + hidden
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict

from spinecli.errors import UnsupportedFamilyError


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
    architecture: str
    set: dict[str, Any]
    drop: tuple[str, ...]
    unless_set: tuple[str, ...]
    """Config keys that the standing-in family cannot express: if one is truthy, it cannot stand in."""


class Family(_Data):
    """One architecture family."""

    model_type: str
    architecture: str
    blocks: str
    attention: AttentionGroup
    feed_forward: FeedForwardGroup
    config_keys: ConfigKeys
    output_bias_switches: dict[str, str]
    """Config keys that give the output projections a bias: "attention", "feed_forward" -> key."""
    indivisible_heads: Stand | None
    gguf_architecture: str | None
    """What llama.cpp calls the family; None if it has no such architecture."""

    def block_prefix(self, index: int) -> str:
        """The prefix of block `index`'s tensors, ending in a dot."""
        return f"{self.blocks}.{index}."


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
