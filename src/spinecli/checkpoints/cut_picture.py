"""A picture of a cut: what every block keeps, and what recovery did to its projections. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, read_manifest
from spinecli.artifacts.picture_file import save_figure
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
class DrawnRecovery:
    """What recovery did to one projection."""

    dense_block: int
    layer: str
    """Relative to the block."""
    error_before: float
    """Relative error of the projection's output on held-out rows, as the cut left it."""
    error_after: float


@dataclass(frozen=True)
class CutPicture:
    """A cut, numbered by the dense model's blocks."""

    blocks: tuple[BlockCut, ...]
    recovered: tuple[DrawnRecovery, ...]
    """Empty if nothing was recovered, or if the model as a whole was better without."""


def cuts_of(directory: Path) -> CutPicture:
    """Read masks and report of a checkpoint directory.

    Raises: ForeignArtifactError if there are no masks, DamagedArtifactError.
    """
    if not (directory / MASKS_NAME).is_file():
        raise ForeignArtifactError(
            f"{directory} has no {MASKS_NAME}, so it does not say what was cut; name a checkpoint that spine prune or "
            "spine tune wrote."
        )
    manifest = read_manifest(directory) if (directory / MANIFEST_NAME).is_file() else None
    return CutPicture(block_cuts(Masks.load(directory)), _recovered(manifest) if manifest else ())


def block_cuts(masks: Masks) -> tuple[BlockCut, ...]:
    """What every block of the dense model keeps."""
    return tuple(
        BlockCut(int(mask.heads.sum()), len(mask.heads), int(mask.channels.sum()), len(mask.channels))
        for mask in masks.blocks
    )


def _recovered(manifest: Manifest) -> tuple[DrawnRecovery, ...]:
    """From the report of a tuning, or of a cut that re-fits."""
    report: Any = manifest.report if manifest.kind == "tuned-checkpoint" else manifest.report.get("refit") or {}
    if report.get("kept") != "tuned":
        return ()
    return tuple(
        DrawnRecovery(layer["dense_block"], layer["layer"], layer["error_before"], layer["error_after"])
        for layer in report["layers"]
    )


_KEPT, _HAD, _REMOVED = "#4472c4", "#d9dce1", "#b3261e"
_LAYERS = ("#4472c4", "#ed7d31", "#70ad47", "#a855b5")
_CUT = "#7f7f7f"
# Beyond this many blocks, numbers above the bars would run into each other.
_MOST_NUMBERED = 24


def save_cut_picture(cuts: CutPicture, title: str, path: Path, below: Callable[[Any], None] | None = None) -> None:
    """Draw heads and channels of every dense block, and below them the projections' errors if any were recovered.

    Args:
        below: draws another panel, on an axis of its own.
    """
    from matplotlib.figure import Figure

    count, panels = len(cuts.blocks), 3 if cuts.recovered else 2
    width = min(max(6.4, 0.32 * count), 20.0)
    rows = panels + (below is not None)
    figure = Figure(figsize=(width, 0.6 + 2.0 * rows), layout="constrained")
    all_axes = figure.subplots(rows, 1)
    axes = all_axes[:panels]
    for axis in axes[:-1]:
        axis.sharex(axes[-1])
        axis.tick_params(labelbottom=False)
    _draw_units(axes[0], cuts.blocks, "heads", lambda block: (block.heads, block.of_heads))
    _draw_units(axes[1], cuts.blocks, "channels", lambda block: (block.channels, block.of_channels))
    if cuts.recovered:
        _draw_recovery(axes[2], cuts.recovered)
    for axis in axes:
        _strike_out(axis, cuts.blocks)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    _explain(axes[0])
    axes[-1].set_xlabel("block of the dense model, input to output")
    axes[-1].set_xticks(range(0, count, -(-count // _MOST_NUMBERED)))
    axes[-1].set_xlim(-0.6, count - 0.4)
    if below is not None:
        below(all_axes[-1])
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _draw_units(axis: Any, blocks: Sequence[BlockCut], name: str, units: Callable[[BlockCut], tuple[int, int]]) -> None:
    kept, had = zip(*map(units, blocks), strict=True)
    places = range(len(blocks))
    axis.bar(places, had, color=_HAD, width=0.8, label="had")
    axis.bar(places, kept, color=_KEPT, width=0.8, label="keeps")
    if len(blocks) <= _MOST_NUMBERED:
        for place, (block, count) in enumerate(zip(blocks, kept, strict=True)):
            if not block.removed:
                axis.annotate(
                    str(count),
                    (place, count),
                    textcoords="offset points",
                    xytext=(0, 2),
                    ha="center",
                    fontsize=7,
                )
    axis.set_ylabel(name)
    axis.set_ylim(0, 1.15 * max(1, *had))


def _draw_recovery(axis: Any, layers: Sequence[DrawnRecovery]) -> None:
    """A line from the error before to the error after; a block's projections stand side by side."""
    names = list(dict.fromkeys(layer.layer for layer in layers))
    for number, name in enumerate(names):
        found = [layer for layer in layers if layer.layer == name]
        places = [layer.dense_block + 0.3 * (number - (len(names) - 1) / 2) for layer in found]
        before, after = [layer.error_before for layer in found], [layer.error_after for layer in found]
        colour = _LAYERS[number % len(_LAYERS)]
        axis.vlines(places, after, before, color=colour, lw=1.5, alpha=0.6)
        axis.plot(places, before, "o", mfc="white", mec=colour, ms=4.5)
        axis.plot(places, after, "o", color=colour, ms=4.5, label=f"{name}, recovered")
    axis.plot([], [], "o", mfc="white", mec=_CUT, ms=4.5, label="as the cut left it")
    axis.set_ylabel("relative error,\nheld-out rows")
    axis.set_ylim(bottom=0)
    _explain(axis)


def _strike_out(axis: Any, blocks: Sequence[BlockCut]) -> None:
    """Mark the blocks of which nothing is left."""
    removed = [place for place, block in enumerate(blocks) if block.removed]
    for place in removed:
        label = "block removed" if place == removed[0] else None
        ends = (place - 0.45, place + 0.45)
        axis.axvspan(*ends, facecolor="none", edgecolor=_REMOVED, hatch="///", alpha=0.35, lw=0, label=label)


def _explain(axis: Any) -> None:
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
