from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinecli.data.batches import batches
from spinecli.data.encoding import Encoded
from spinecli.errors import MessageError
from spinecli.federation.client.part import load_part, part_of, save_part


def encoded(task: str, counts: list[int], segments: bool = False) -> Encoded:
    """So many rows for each example, no two rows alike."""
    rows = sum(counts)
    tokens = tuple(torch.arange(row, row + 2 + row % 3) for row in range(rows))
    offsets = tuple(sum(counts[:number]) for number in range(len(counts) + 1))
    classified = task == "classification"
    return Encoded(
        task="classification" if classified else "language",
        tokens=tokens,
        labels=torch.arange(rows) % 3 if classified else torch.empty(0, dtype=torch.int64),
        prompt_lengths=torch.empty(0, dtype=torch.int64) if classified else torch.arange(rows) % 2,
        segments=tuple(torch.ones_like(row) for row in tokens) if segments else None,
        offsets=offsets,
        pad_id=7,
        shortened=1,
    )


@st.composite
def wholes(draw: st.DrawFn) -> tuple[Encoded, list[int]]:
    task = draw(st.sampled_from(["classification", "language"]))
    size = draw(st.integers(1, 12))
    counts = [1] * size if task == "classification" else draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    whole = encoded(task, counts, draw(st.booleans()) and task == "classification")
    chosen = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    return whole, chosen


@given(wholes(), st.integers(0, 99))
def test_batches_of_a_part_are_those_drawn_from_the_whole(drawn: tuple[Encoded, list[int]], seed: int) -> None:
    whole, chosen = drawn
    part = part_of(whole, chosen)
    own = batches(part, range(len(chosen)), 3, 4, torch.Generator().manual_seed(seed))
    theirs = batches(whole, chosen, 3, 4, torch.Generator().manual_seed(seed))
    for left, right in zip(own, theirs, strict=True):
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.attention_mask, right.attention_mask)
        assert torch.equal(left.labels, right.labels)


@given(wholes())
def test_a_part_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Encoded, list[int]]
) -> None:
    path = tmp_path_factory.mktemp("part") / "part.safetensors"
    part = part_of(*drawn)
    save_part(part, path)
    found = load_part(path)
    assert (found.task, found.offsets, found.pad_id, found.shortened) == (
        part.task,
        part.offsets,
        part.pad_id,
        part.shortened,
    )
    assert all(torch.equal(left, right) for left, right in zip(found.tokens, part.tokens, strict=True))
    assert torch.equal(found.labels, part.labels)
    assert torch.equal(found.prompt_lengths, part.prompt_lengths)
    assert (found.segments is None) == (part.segments is None)


def test_a_part_holds_nothing_of_others(tmp_path: Path) -> None:
    whole = encoded("classification", [1] * 6)
    save_part(part_of(whole, [1, 4]), tmp_path / "part")
    found = load_part(tmp_path / "part")
    assert [row.tolist() for row in found.tokens] == [whole.tokens[1].tolist(), whole.tokens[4].tolist()]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part"
    save_part(encoded("classification", [1, 1]), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MessageError):
        load_part(path)
