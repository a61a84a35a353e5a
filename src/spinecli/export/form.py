"""The form that a checkpoint takes in llama.cpp: which architecture, blocks of which shapes, turned how."""

from __future__ import annotations

from dataclasses import dataclass

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.shape import BlockShape
from spinecli.export.architecture import Architecture, architecture_of
from spinecli.export.block_filling import filled_shapes
from spinecli.export.config_checks import check_config
from spinecli.export.rotary import Rotary, rotary_of


@dataclass(frozen=True)
class Form:
    """How a checkpoint is written."""

    architecture: Architecture
    shapes: tuple[BlockShape, ...]
    """Of the blocks as they are written, some perhaps filled up with zeros."""
    rotary: Rotary | None


def form_of(checkpoint: Checkpoint) -> Form:
    """The form of a checkpoint, from its configuration and shapes alone.

    Raises: UnexportableError if llama.cpp has none that computes the same.
    """
    architecture = architecture_of(checkpoint)
    check_config(checkpoint, architecture)
    return Form(
        architecture=architecture,
        shapes=filled_shapes(checkpoint.shapes, architecture, checkpoint.d_model),
        rotary=rotary_of(checkpoint, architecture) if architecture.rotary else None,
    )
