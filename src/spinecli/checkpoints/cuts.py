"""What was cut out of every block, and what recovery did about it, as far as a directory tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, read_manifest
from spinecli.checkpoints.masks import MASKS_NAME, Masks
from spinecli.errors import ForeignArtifactError


@dataclass(frozen=True)
class BlockCut:
    """What one block of the dense model keeps."""

    heads: int
    of_heads: int
    """What it had."""
    channels: int
    of_channels: int

    @property
    def removed(self) -> bool:
        """Whether nothing of it is left."""
        return not self.heads and not self.channels


@dataclass(frozen=True)
class LayerRecovery:
    """What recovery did to one projection."""

    dense_block: int
    layer: str
    """Relative to the block."""
    error_before: float
    """Relative error of the projection's output on held-out rows, as the cut left it."""
    error_after: float


@dataclass(frozen=True)
class Cuts:
    """A cut, numbered by the dense model's blocks."""

    blocks: tuple[BlockCut, ...]
    recovered: tuple[LayerRecovery, ...]
    """Empty if nothing was recovered, or if the model as a whole was better without."""


def cuts_of(directory: Path) -> Cuts:
    """Read masks and report of a checkpoint directory.

    Raises: ForeignArtifactError if there are no masks, DamagedArtifactError.
    """
    if not (directory / MASKS_NAME).is_file():
        raise ForeignArtifactError(
            f"{directory} has no {MASKS_NAME}, so it does not say what was cut; name a checkpoint that spine prune or "
            "spine tune wrote."
        )
    manifest = read_manifest(directory) if (directory / MANIFEST_NAME).is_file() else None
    return Cuts(block_cuts(Masks.load(directory)), _recovered(manifest) if manifest else ())


def block_cuts(masks: Masks) -> tuple[BlockCut, ...]:
    """What every block of the dense model keeps."""
    return tuple(
        BlockCut(int(mask.heads.sum()), len(mask.heads), int(mask.channels.sum()), len(mask.channels))
        for mask in masks.blocks
    )


def _recovered(manifest: Manifest) -> tuple[LayerRecovery, ...]:
    """From the report of a tuning, or of a cut that re-fits."""
    report: Any = manifest.report if manifest.kind == "tuned-checkpoint" else manifest.report.get("refit") or {}
    if report.get("kept") != "tuned":
        return ()
    return tuple(
        LayerRecovery(layer["dense_block"], layer["layer"], layer["error_before"], layer["error_after"])
        for layer in report["layers"]
    )
