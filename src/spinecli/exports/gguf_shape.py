"""The shape in which a GGUF file carries a checkpoint, if llama.cpp has one that computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import UnexportableError
from spinecli.exports.architecture import Architecture, architecture_of
from spinecli.exports.layout import filled_shapes
from spinecli.exports.rotary import Rotary, rotary_of

_MOST_BLOCKS = 512
"""LLAMA_MAX_LAYERS of llama.cpp."""


def check_config(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuse what the architecture cannot express.

    Raises: UnexportableError.
    """
    for key, allowed in architecture.required.items():
        value = getattr(checkpoint.config, key, None)
        if value is not None and value not in allowed:
            raise _refused(checkpoint, architecture, key, f"computes with {' or '.join(map(repr, allowed))} only")
    for key in architecture.needed:
        if getattr(checkpoint.config, key, None) is None:
            raise _refused(checkpoint, architecture, key, "needs a value there")
    for key in architecture.refused:
        if getattr(checkpoint.config, key, None) is not None:
            raise _refused(checkpoint, architecture, key, "does not compute that")
    for key in architecture.head_dim_twins:
        if getattr(checkpoint.config, key, None) != checkpoint.shapes[0].head_dim:
            raise _refused(checkpoint, architecture, key, f"wants the size of a head, {checkpoint.shapes[0].head_dim}")
    for key, pattern in architecture.patterns.items():
        values = getattr(checkpoint.config, key, None)
        if values is not None and list(values) != list(islice(cycle(pattern), len(values))):
            raise _refused(checkpoint, architecture, key, f"repeats {list(pattern)} whatever blocks have left")
    if architecture.tied and not checkpoint.config.tie_word_embeddings:
        raise _refused(checkpoint, architecture, "tie_word_embeddings", "ties them")
    if checkpoint.blocks in architecture.refused_blocks or checkpoint.blocks > _MOST_BLOCKS:
        raise UnexportableError(
            f"has {checkpoint.blocks} blocks, a number that llama.cpp's {architecture.name} takes for another model",
            checkpoint.path,
        )


def _refused(checkpoint: Checkpoint, architecture: Architecture, key: str, reason: str) -> UnexportableError:
    value = getattr(checkpoint.config, key, None)
    return UnexportableError(f"has {key} {value!r}, and llama.cpp's {architecture.name} {reason}", checkpoint.path)


@dataclass(frozen=True)
class GgufShape:
    """How a checkpoint is written."""

    architecture: Architecture
    shapes: tuple[BlockShape, ...]
    """Of the blocks as they are written, some perhaps filled up with zeros."""
    rotary: Rotary | None


def gguf_shape_of(checkpoint: Checkpoint) -> GgufShape:
    """The form of a checkpoint, from its configuration and shapes alone.

    Raises: UnexportableError if llama.cpp has none that computes the same.
    """
    architecture = architecture_of(checkpoint)
    check_config(checkpoint, architecture)
    return GgufShape(
        architecture=architecture,
        shapes=filled_shapes(checkpoint.shapes, architecture, checkpoint.d_model),
        rotary=rotary_of(checkpoint, architecture) if architecture.rotary else None,
    )
