from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinecli.checkpoints.masks import MASKS_NAME, BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import DamagedArtifactError, ForeignArtifactError

SHAPE = BlockShape(heads=4, kv_heads=2, head_dim=8, channels=6)


def mask(heads: list[int], channels: list[int]) -> BlockMask:
    return BlockMask(torch.tensor(heads, dtype=torch.bool), torch.tensor(channels, dtype=torch.bool))


bits = st.integers(0, 1)
block_masks = st.builds(mask, st.lists(bits, min_size=4, max_size=4), st.lists(bits, min_size=6, max_size=6))


@given(blocks=st.lists(block_masks, min_size=1, max_size=4))
def test_masks_come_back_from_disk(tmp_path_factory: pytest.TempPathFactory, blocks: list[BlockMask]) -> None:
    directory = tmp_path_factory.mktemp("masks")
    masks = Masks(tuple(blocks))
    masks.save(directory)
    loaded = Masks.load(directory)
    assert loaded.kept_blocks == masks.kept_blocks
    for before, after in zip(masks.blocks, loaded.blocks, strict=True):
        assert torch.equal(before.heads, after.heads)
        assert torch.equal(before.channels, after.channels)


def test_masks_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    Masks.full((SHAPE,) * 3).save(tmp_path)
    assert Masks.load(tmp_path).kept_blocks == [0, 1, 2]


def test_kept_and_removed_blocks_partition_the_model() -> None:
    gone = mask([0] * 4, [0] * 6)
    masks = Masks((gone, mask([1, 1, 0, 0], [1] * 6), gone, mask([0] * 4, [1] * 6)))
    assert masks.kept_blocks == [1, 3]
    assert masks.removed_blocks == [0, 2]


def test_shape_after_counts_what_is_kept() -> None:
    one_group = mask([0, 0, 1, 1], [1, 0, 1, 0, 1, 0])
    assert one_group.shape_after(SHAPE) == BlockShape(2, 1, 8, 3)
    assert one_group.kv_heads(SHAPE).tolist() == [False, True]
    one_of_each = mask([1, 0, 0, 1], [1] * 6)
    assert one_of_each.shape_after(SHAPE) == BlockShape(2, 2, 8, 6)


def test_uniform_shape_ignores_removed_blocks_and_refuses_ragged_ones() -> None:
    gone, some = mask([0] * 4, [0] * 6), mask([1, 1, 0, 0], [1, 0, 1, 0, 1, 0])
    other_places = mask([0, 0, 1, 1], [0, 1, 0, 1, 0, 1])
    assert Masks((gone, some, other_places)).uniform_shape(SHAPE) == BlockShape(2, 1, 8, 3)
    for ragged in (mask([1] * 4, [1, 0, 1, 0, 1, 0]), mask([1, 1, 0, 0], [1] * 6)):
        with pytest.raises(ValueError, match="differ in shape"):
            Masks((some, ragged)).uniform_shape(SHAPE)


def test_absent_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ForeignArtifactError, match=MASKS_NAME):
        Masks.load(tmp_path)
    Masks.full((SHAPE,) * 1).save(tmp_path)
    file = tmp_path / MASKS_NAME
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DamagedArtifactError, match=MASKS_NAME):
        Masks.load(tmp_path)


def test_group_size_and_wording() -> None:
    assert SHAPE.group_size == 2
    assert str(SHAPE) == "4 heads / 2 KV, 6 channels"
    assert str(BlockShape(4, 4, 8, 6)) == "4 heads, 6 channels"
