"""How far a device is cut, and which units go: whole heads, then channels, the same number in every block.

Every block of a device keeps the same widths, so that at any moment its model can be written as a plain checkpoint.
Unit, ramp and interval follow FedSpine as docs/algorithms/fedspine.md reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import BlockCosts, block_costs
from spinecli.checkpoints.cutting import head_counts, heads_can_leave, kept_rows
from spinecli.checkpoints.family import Family
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape, Heads
from spinecli.errors import OptionError

_WARM_UP = 0.1
_COOL_DOWN = 0.1
_SMALLEST_CHANNEL_SHARE = 0.05


@dataclass(frozen=True)
class UnitCounts:
    """What every block of a device keeps."""

    kv_heads: int
    channels: int


@dataclass(frozen=True)
class PrunableUnits:
    """What can leave a checkpoint's blocks, and what it saves."""

    costs: BlockCosts
    kv_counts: tuple[int, ...]
    """KV heads a block may keep so that the result can be written, falling; one entry if heads cannot leave."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PrunableUnits:
        """Of a checkpoint whose blocks are all alike.

        Heads of fused projections stay: modules split these by the configuration's sizes, which all devices share.

        Raises: OptionError if they are not alike.
        """
        if not checkpoint.is_uniform:
            raise OptionError(
                f"Pruning in the rounds keeps all blocks equally wide, and those of {checkpoint.path} are not; take a "
                "strategy that does not prune, or a checkpoint that was pruned with --widths uniform."
            )
        free = heads_can_leave(checkpoint) and checkpoint.family.attention.fused is None
        heads = head_counts(checkpoint, Heads.cut if free else Heads.keep)
        return cls(block_costs(checkpoint), tuple(count // checkpoint.shape.group_size for count in heads))

    @property
    def dense(self) -> BlockShape:
        """The uncut shape."""
        return self.costs.dense

    def widths_at(self, ratio: float, present: UnitCounts | None = None, end: UnitCounts | None = None) -> UnitCounts:
        """The widths whose block parameters are (1 - ratio) of the dense ones, to within half a channel.

        Of the counts of KV groups from which channels can make up the difference, the one nearest to (1 - ratio) of
        all. At least one group and 5 % of the channels stay, so a very high ratio may not be reached.

        On the way from `present` to `end`, a device that has lost channels for a lower ratio cannot get them back for
        the group that should leave at a higher one: the group then leaves later, and the ratio is met as nearly as
        whole groups allow, exactly at the end.

        Args:
            present: what is still there; all, if None.
            end: what will be left in the end, and is not cut into; the least possible, if None.
        """
        dense, costs = self.dense, self.costs
        present = present or UnitCounts(dense.kv_heads, dense.channels)
        end = end or UnitCounts(min(self.kv_counts), max(1, round(_SMALLEST_CHANNEL_SHARE * dense.channels)))

        def fitted(groups: int) -> tuple[int, float, UnitCounts]:
            """How many channels are too many or too few, how far the groups are from their share, and the widths."""
            gone = (ratio * costs.block - (dense.kv_heads - groups) * costs.kv_group) / costs.channel
            wanted = dense.channels - round(gone)
            channels = min(max(wanted, end.channels), present.channels)
            return abs(wanted - channels), abs(groups - (1 - ratio) * dense.kv_heads), UnitCounts(groups, channels)

        fewest = min(end.kv_heads, present.kv_heads)
        candidates = [fitted(groups) for groups in self.kv_counts if fewest <= groups <= present.kv_heads]
        return min(candidates, key=lambda each: each[:2])[2]

    def ratio_of(self, widths: UnitCounts) -> float:
        """Share of the block parameters that `widths` removes."""
        return 1 - self.costs.parameters(self.shape_of(widths)) / self.costs.block

    def shape_of(self, widths: UnitCounts) -> BlockShape:
        """The block's shape at `widths`."""
        dense = self.dense
        return BlockShape(widths.kv_heads * dense.group_size, widths.kv_heads, dense.head_dim, widths.channels)

    def widths_of(self, masks: Masks) -> UnitCounts:
        """The widths of a device's masks; ValueError if its blocks differ."""
        shape = masks.uniform_shape(self.dense)
        return UnitCounts(shape.kv_heads, shape.channels)


@dataclass(frozen=True, eq=False)
class Importance:
    """Smoothed scores of one block's units, in the dense numbering; units that are gone stay at their last value."""

    heads: Tensor
    """(heads,) float32."""
    channels: Tensor
    """(channels,) float32."""

    @classmethod
    def zeros(cls, dense: BlockShape) -> Importance:
        """Nothing is known yet."""
        return cls(torch.zeros(dense.heads), torch.zeros(dense.channels))


def ramp(step: int, steps: int, start: float, end: float) -> float:
    """The cubic ramp p(k) = p_end + (p_0 - p_end) (1 - (k - k_w) / (K - k_w - k_c))^3 over a round's local steps.

    k_w = 0.1 K steps of warm-up at `start`, k_c = 0.1 K steps of cool-down at `end` (LoRAPrune's schedule; that a round
    of FedSpine uses it is this project's reading).
    """
    warm, cool = _WARM_UP * steps, _COOL_DOWN * steps
    progress = min(max((step - warm) / max(steps - warm - cool, 1e-9), 0.0), 1.0)
    return end + (start - end) * (1 - progress) ** 3


def narrowed(masks: Masks, widths: UnitCounts, importance: Sequence[Importance], dense: BlockShape) -> Masks:
    """Masks that keep the most important of the units that are still there; nothing comes back.

    Args:
        importance: of every block's units, in the dense numbering.
    """
    blocks = []
    for mask, scores in zip(masks.blocks, importance, strict=True):
        groups = mask.heads.view(dense.kv_heads, dense.group_size).any(dim=1)
        by_group = scores.heads.view(dense.kv_heads, dense.group_size).sum(dim=1)
        kept_groups = _best(by_group, groups, widths.kv_heads)
        blocks.append(
            BlockMask(
                kept_groups.repeat_interleave(dense.group_size),
                _best(scores.channels, mask.channels, widths.channels),
            )
        )
    return Masks(tuple(blocks))


def kept_units(
    masks: Masks, family: Family, dense: Sequence[BlockShape], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Kept rows and kept columns of the adapted projections that have lost some, as indices by full name.

    Args:
        dense: uncut shape of every block.
        shapes: uncut (d_out, d_in) of the adapted projections, by full name.
    """
    kept_by_axis: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for index, mask in enumerate(masks.blocks):
        for relative, (axis, kept) in kept_rows(family, mask, dense[index]).items():
            name = f"{family.blocks}.{index}.{relative}"
            if name in shapes and len(kept) < shapes[name][axis]:
                kept_by_axis[axis][name] = kept
    return kept_by_axis


def _best(scores: Tensor, present: Tensor, count: int) -> Tensor:
    """The `count` highest scores among the present units; of equals, the first."""
    ranked = torch.where(present, scores, torch.full_like(scores, -torch.inf))
    kept = torch.zeros_like(present)
    kept[torch.argsort(ranked, descending=True, stable=True)[: min(count, int(present.sum()))]] = True
    return kept
