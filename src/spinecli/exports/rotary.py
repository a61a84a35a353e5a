"""Rotary embeddings as llama.cpp reads them: base, dimensions and scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import UnexportableError
from spinecli.exports.architecture import Architecture


@dataclass(frozen=True, eq=False)
class Rotary:
    """What turns queries and keys."""

    dimensions: int
    """Of each head, from its first on."""
    base: float
    settings: dict[str, str | int | float]
    """Keys relative to `ARCHITECTURE.rope.`."""
    factors: Tensor | None
    """(dimensions / 2,) float32: what each frequency is divided by; None without."""


def rotary_of(checkpoint: Checkpoint, architecture: Architecture) -> Rotary:
    """The rotary embedding of a checkpoint.

    Raises: UnexportableError for a scaling that llama.cpp does not have in this architecture.
    """
    stated = dict(getattr(checkpoint.config, "rope_parameters", None) or {})
    found, local_base = _rules(checkpoint, architecture, stated)
    kind = str(found.get("rope_type", "default"))
    head_dim = checkpoint.shapes[0].head_dim
    dimensions = int(head_dim * float(found.get("partial_rotary_factor") or 1.0))
    if kind not in architecture.rope_scalings:
        raise UnexportableError(
            f"has rotary scaling {kind!r}, which llama.cpp's {architecture.name} does not compute", checkpoint.path
        )
    if dimensions != head_dim and not architecture.partial_rotation:
        raise UnexportableError(
            f"turns {dimensions} of the {head_dim} dimensions of a head, and llama.cpp's {architecture.name} turns all",
            checkpoint.path,
        )
    base = float(found.get("rope_theta", 10000.0))
    settings: dict[str, str | int | float] = {} if local_base is None else {"freq_base_swa": local_base}
    factors = None
    if kind == "linear":
        settings |= {"scaling.type": "linear", "scaling.factor": float(found["factor"])}
    elif kind == "yarn":
        settings |= _yarn(checkpoint, found)
    elif kind == "llama3":
        factors = llama3_factors(dimensions, base, found)
    return Rotary(dimensions, base, settings, factors)


def _rules(
    checkpoint: Checkpoint, architecture: Architecture, stated: dict[str, Any]
) -> tuple[dict[str, Any], float | None]:
    """How the blocks turn that see the whole row, and the base of those with a window, where that is another one."""
    by_kind = {kind: rules for kind, rules in stated.items() if isinstance(rules, dict)}
    if not by_kind:
        return stated, None
    local, whole = by_kind.get("sliding_attention"), by_kind.get("full_attention")
    if architecture.sliding and whole and local and local.get("rope_type", "default") == "default":
        return whole, float(local["rope_theta"])
    raise UnexportableError(
        f"rotates queries by different rules in different blocks, which llama.cpp's {architecture.name} does not",
        checkpoint.path,
    )


def _yarn(checkpoint: Checkpoint, found: dict[str, Any]) -> dict[str, str | int | float]:
    """YaRN with the attention factor that llama.cpp computes by itself, 0.1 ln(factor) + 1, or another one."""
    if found.get("mscale") or found.get("mscale_all_dim") or found.get("truncate") is False:
        raise UnexportableError(
            "has a variant of YaRN (mscale, mscale_all_dim or truncate) that llama.cpp does not compute",
            checkpoint.path,
        )
    factor = float(found["factor"])
    original = found.get("original_max_position_embeddings") or checkpoint.config.max_position_embeddings
    settings: dict[str, str | int | float] = {
        "scaling.type": "yarn",
        "scaling.factor": factor,
        "scaling.original_context_length": int(original),
        "scaling.yarn_beta_fast": float(found.get("beta_fast") or 32.0),
        "scaling.yarn_beta_slow": float(found.get("beta_slow") or 1.0),
    }
    wanted = found.get("attention_factor")
    if wanted is not None:
        settings["scaling.attn_factor"] = float(wanted) / (0.1 * math.log(factor) + 1.0)
    return settings


def llama3_factors(dimensions: int, base: float, found: dict[str, Any]) -> Tensor:
    """What Llama 3's scaling divides each frequency by: (dimensions / 2,).

    Wavelengths above `original / low_freq_factor` are stretched by the whole factor, those below
    `original / high_freq_factor` not at all, and in between by an interpolation of the inverse.
    """
    frequencies = base ** (-torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions)
    turns = float(found["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    low, high, factor = (float(found[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).float()
