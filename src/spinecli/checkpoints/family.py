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

from collections.abc import Mapping
from enum import Enum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from spinecli.artifacts.record import Record
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


class AttentionGroup(Record):
    """Names of the attention projections, relative to a block; one name thrice if query, key and value are fused."""

    query: str
    key: str
    value: str
    output: str
    cuttable: bool
    """False where the plain format ties the head size to hidden_size / heads, so that no head can leave."""
    divides_width: bool = False
    """The plain format wants a head count that divides hidden_size, and no other family can stand in for the rest."""
    fixed_by: str | None = None
    """A configuration value, keys joined by dots, that ties the head size to hidden_size / heads if it is set."""
    fused: Literal["by part", "by head"] | None = None
    """How the rows of a fused projection lie: all queries, then keys, then values; or head after head."""

    @property
    def projections(self) -> tuple[str, ...]:
        """All of them, inputs first."""
        return tuple(dict.fromkeys((self.query, self.key, self.value, self.output)))


class FeedForwardGroup(Record):
    """Names of the feed-forward projections, relative to a block."""

    inputs: tuple[str, ...]
    """One name twice if both are fused, one above the other."""
    output: str

    @property
    def projections(self) -> tuple[str, ...]:
        """All of them, inputs first."""
        return tuple(dict.fromkeys((*self.inputs, self.output)))


class ConfigKeys(Record):
    """Which keys of config.json hold the sizes."""

    blocks: str
    heads: str
    kv_heads: str | None
    head_dim: str | None
    channels: str
    channels_per_width: int | None = None
    """Channels are so many times hidden_size where their key is null."""
    pre_norm: str | None = None
    """A boolean key that tells pre-norm from post-norm, where the family has both."""
    parallel: str | None = None
    """A boolean key: both sub-layers read the block's input, and their outputs are added to it together."""


class FallbackFamily(Record):
    """The family that carries a head count which does not divide hidden_size, with bit-identical modules."""

    model_type: str
    set: dict[str, Any]
    drop: tuple[str, ...]
    unless_set: tuple[str, ...]
    """Config keys that the standing-in family cannot express: if one is truthy, it cannot stand in."""


class Family(Record):
    """One architecture family."""

    model_type: str
    kind: Literal["causal", "encoder"]
    architecture: str
    """The language model: next-token of a causal family, masked of an encoder."""
    classification_architecture: str | None
    """None if transformers has no classifier of the family."""
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
    output_norms: bool = False
    """A norm stands on what each sub-layer gives, before it is added to the residual stream."""
    input_norms: bool = True
    """False if, with norms on the outputs, none stand before the sub-layers."""
    transposed: bool = False
    """The projections' weights are stored (d_in, d_out), as transformers' Conv1D has them."""
    positions_behind_padding: bool = False
    """Positions are counted from pad_token_id + 1, so that many fewer tokens fit."""
    required: dict[str, Any] = Field(default_factory=dict)
    """Config keys that, if they are there, must hold these values: what the modules can do and spine cannot."""
    stored_names: dict[str, str] = Field(default_factory=dict)
    """Modules outside the blocks that files call otherwise than the architecture does: its name -> theirs."""
    block_lists: tuple[str, ...] = ("layer_types",)
    """Config keys with one entry per block, if they are there: entries of removed blocks leave with them."""
    output_bias_switches: dict[str, str]
    """Config keys that give the output projections a bias: "attention", "feed_forward" -> key."""
    indivisible_heads: FallbackFamily | None
    narrow_heads: str | None = None
    """The `model_type` that carries fewer heads of the same size, where this one cannot."""
    varied: str | None = None
    """The `model_type` that carries blocks of differing widths, where there is one."""
    modelling_file: str | None = None
    """The file that is shipped with a checkpoint because transformers does not know the family; else None."""
    gguf_architecture: str | None
    """The architecture of llama.cpp that carries equal blocks; None if there is none.

    `spine export` writes it if `spinecli/exports/architectures` has a file for it, which says what becomes of blocks
    that differ.
    """

    @property
    def sub_layers(self) -> dict[str, tuple[str, ...]]:
        """What belongs to a sub-layer and leaves with it as a whole: "attention", "mlp" -> modules of a block."""
        if self.varied is None:
            return {}
        return {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}

    @property
    def projections(self) -> tuple[str, ...]:
        """All coupled projections of a block, relative to it: attention, then feed-forward."""
        return (*self.attention.projections, *self.feed_forward.projections)

    @property
    def transposed_names(self) -> frozenset[str]:
        """Tensors of a block, relative to it, that are stored (d_in, d_out)."""
        return frozenset(f"{name}.weight" for name in self.projections if self.transposed)

    @property
    def heads_can_leave(self) -> bool:
        """Whether a checkpoint with fewer heads can be written at all."""
        return self.attention.cuttable or self.narrow_heads is not None

    def stored_name(self, name: str) -> str:
        """What files call the architecture's tensor `name`."""
        module, _, kind = name.rpartition(".")
        return f"{self.stored_names[module]}.{kind}" if module in self.stored_names else name

    def require_classifier(self) -> None:
        """Raise UnsupportedFamilyError if transformers has no classifier of the family."""
        if self.classification_architecture is None:
            raise UnsupportedFamilyError(
                f"transformers has no classifier of the model type {self.model_type!r}; fine-tune it with --task "
                "language, or name a model of another family."
            )

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
    plain = {family.model_type: family for family in found}
    varied = {family.varied: _varied(plain[family.varied.removeprefix("varied_")]) for family in found if family.varied}
    return dict(sorted((plain | varied).items()))


def _varied(family: Family) -> Family:
    """The family whose blocks differ in width, built from the same modules."""
    return family.model_copy(
        update={
            "model_type": family.varied,
            "architecture": f"Varied{family.architecture}",
            "classification_architecture": f"Varied{family.classification_architecture}",
            "bare_architecture": f"Varied{family.architecture.removesuffix('ForCausalLM')}Model",
            "modelling_file": "modeling_varied.py",
        }
    )


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; UnsupportedFamilyError with the list of those that anybody may have."""
    try:
        return families()[model_type]
    except KeyError:
        known = ", ".join(name for name, family in families().items() if family.modelling_file is None)
        raise UnsupportedFamilyError(f"The model type {model_type!r} is not supported; spine knows {known}.") from None


def family_of_config(file: Path, raw_config: Mapping[str, Any]) -> Family:
    """The family of the checkpoint whose configuration lies in `file`.

    Raises: UnsupportedFamilyError, which says of a multimodal wrapper and of a model with code of its own what they
    are.
    """
    model_type = str(raw_config.get("model_type", ""))
    if model_type in families():
        return families()[model_type]
    if not model_type:
        raise UnsupportedFamilyError(f"{file} names no model type, so nothing says what the model is; add model_type.")
    parts = (raw_config.get(name) for name in ("text_config", "llm_config", "language_config"))
    if text := next((part for part in parts if isinstance(part, dict)), None):
        inside = text.get("model_type", "text model")
        way_out = "save that part alone with transformers and name its directory"
        raise UnsupportedFamilyError(f"{file} wraps a {inside} in a multimodal {model_type}; {way_out}.")
    if raw_config.get("auto_map"):
        raise UnsupportedFamilyError(
            f"{file} names its own code for the model type {model_type!r}, and spine runs no code from a "
            "checkpoint; if its layers are those of a family that spine knows, save it as one with transformers."
        )
    return family_of(model_type)


# How transformers' classes of language models end.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


def task_of(file: Path, family: Family, raw_config: dict[str, Any]) -> Task:
    """The task of the checkpoint whose configuration lies in `file`.

    A causal checkpoint is a language model if it names nothing, or the model without its head, which may be tied; an
    encoder that names nothing is bare.

    Raises: UnsupportedFamilyError for another head, and for variants that spine cannot run.
    """
    for key, value in family.required.items():
        if raw_config.get(key) not in (None, value):
            raise UnsupportedFamilyError(
                f"{file} has {key} {raw_config[key]!r}; spine opens {family.model_type} with {value!r} only."
            )
    named = raw_config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture is not None and architecture == family.classification_architecture:
        return Task.classification
    headless = family.bare_architecture or MODEL_MAPPING_NAMES.get(family.model_type)
    if family.kind == "causal" and (architecture in (None, headless) or str(architecture).endswith(_LANGUAGE_MODELS)):
        return Task.causal_lm
    known = {family.architecture: Task.masked_lm, family.bare_architecture: Task.encoding, None: Task.encoding}
    if family.kind == "causal" or architecture not in known:
        opened = (headless, family.architecture, family.classification_architecture)
        raise UnsupportedFamilyError(
            f"{file} names the architecture {architecture!r}, whose head spine does not know; it opens "
            f"{', '.join(filter(None, opened))}."
        )
    return known[architecture]
