from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import Recipe, recipe, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

import spinecli.artifacts.directory as directory_module
from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import cut_checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.tensors import ComputedTensor
from spinecli.checkpoints.writer import plan_shards, write_checkpoint
from spinecli.errors import NoSpaceError

SHARD_BYTES = 20_000
Opened = Callable[[Recipe], Checkpoint]


def planned(size: int) -> ComputedTensor:
    return ComputedTensor((size,), torch.float32, lambda: torch.arange(float(size)))


@given(
    sizes=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=8),
    limit=st.integers(1, 60),
)
def test_shards_hold_every_tensor_in_order_and_no_more_than_they_may(sizes: list[list[int]], limit: int) -> None:
    groups = [{f"{g}.{t}": planned(size) for t, size in enumerate(group)} for g, group in enumerate(sizes)]
    shards = plan_shards(groups, limit * 4)
    assert [item for shard in shards for item in shard.items()] == [item for group in groups for item in group.items()]
    for shard in shards:
        assert shard
        assert sum(tensor.bytes for tensor in shard.values()) <= limit * 4 or len(shard) == 1
    for group in groups:
        if sum(tensor.bytes for tensor in group.values()) <= limit * 4:
            assert sum(any(name in group for name in shard) for shard in shards) == 1


def write(checkpoint: Checkpoint, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    directory.mkdir(exist_ok=True)
    cut = cut_checkpoint(checkpoint, Masks.full((checkpoint.shape,) * checkpoint.blocks))
    write_checkpoint(directory, cut.raw_config, cut.groups(), cut.path, shard_bytes=shard_bytes)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_small_checkpoints_are_one_file(opened: Opened, tmp_path: Path) -> None:
    write(opened(recipe("llama")), tmp_path, shard_bytes=1 << 30)
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {"model.safetensors"}


def test_large_checkpoints_are_shards_with_an_index_that_fits(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama"))
    write(checkpoint, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) >= 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == checkpoint.bytes
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], checkpoint.read(name))
    assert set(index["weight_map"]) == set(checkpoint.tensors)


def test_the_tokenizer_travels_along(opened: Opened, tmp_path: Path) -> None:
    write(opened(recipe("qwen3")), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("bat dis")["input_ids"] == tokenizer()("bat dis")["input_ids"]


def test_the_same_bytes_every_time(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama"))
    write(checkpoint, tmp_path / "one")
    write(checkpoint, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_killed_write_goes_on_and_keeps_finished_shards(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("llama"))
    write(checkpoint, tmp_path / "whole")
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    killed = tmp_path / "killed"
    killed.mkdir()
    first, half = (killed / shard.name for shard in shards[:2])
    first.write_bytes(shards[0].read_bytes())
    half.with_suffix(".part").write_bytes(shards[1].read_bytes()[:50])
    (killed / "tokenizer.json").write_text("{")  # cut short by the kill
    before = first.stat()
    write(checkpoint, killed)
    assert content(killed) == content(tmp_path / "whole")
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_only_missing_shards_are_made(tmp_path: Path) -> None:
    made: list[str] = []

    def tensor(name: str) -> ComputedTensor:
        def make() -> torch.Tensor:
            made.append(name)
            return torch.ones(4)

        return ComputedTensor((4,), torch.float32, make)

    groups = [{name: tensor(name)} for name in "abc"]
    write_checkpoint(tmp_path, {}, groups, tmp_path, shard_bytes=16)
    assert made == ["a", "b", "c"]
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    write_checkpoint(tmp_path, {}, groups, tmp_path, shard_bytes=16)
    assert made == ["a", "b", "c", "b"]


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def make() -> torch.Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.ones(4).as_subclass(Counted)

    groups = [{f"{block}.{part}": ComputedTensor((4,), torch.float32, make) for part in "ab"} for block in range(5)]
    write_checkpoint(tmp_path, {}, groups, tmp_path, shard_bytes=32)
    assert most <= 3


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    for wrong in (torch.ones(5), torch.ones(4).half()):
        group = {"w": ComputedTensor((4,), torch.float32, lambda wrong=wrong: wrong)}
        with pytest.raises(ValueError, match=r"announced as \(4,\) torch.float32"):
            write_checkpoint(tmp_path, {}, [group], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = directory_module.shutil.disk_usage(tmp_path)._replace(free=15)
    monkeypatch.setattr(directory_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoSpaceError):
        write_checkpoint(tmp_path, {}, [{"a": planned(4)}], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_shards(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    groups = [{"a": planned(4)}, {"b": planned(4)}]
    context = RunContext(progress=lambda _, done, total: seen.append((done, total)))
    write_checkpoint(tmp_path, {}, groups, tmp_path, context, shard_bytes=16)
    assert seen == [(1, 2), (2, 2)]
