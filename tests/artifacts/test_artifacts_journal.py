from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import spinecli.artifacts.journal as journal_module
from spinecli.artifacts.journal import PassJournal


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    stream = torch.randn(3, 4)
    journal = PassJournal(tmp_path, "scoring")
    # both streams share memory before the first removed block
    journal.save(2, {"teacher": stream, "student": stream, "part": stream[1:], "found": torch.ones(2).double()})
    saved = PassJournal(tmp_path, "scoring").load()
    assert saved is not None
    assert saved.finished == 2
    assert torch.equal(saved.tensors["teacher"], stream)
    assert torch.equal(saved.tensors["student"], stream)
    assert torch.equal(saved.tensors["part"], stream[1:])
    assert saved.tensors["found"].dtype is torch.float64


def test_nothing_saved(tmp_path: Path) -> None:
    assert PassJournal(tmp_path, "scoring").load() is None


def test_each_pass_has_its_own_state(tmp_path: Path) -> None:
    PassJournal(tmp_path, "scoring").save(1, {"hidden": torch.ones(1)})
    assert PassJournal(tmp_path, "comparing").load() is None


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_state_cut_short_counts_as_none(tmp_path: Path, kept: int) -> None:
    journal = PassJournal(tmp_path, "scoring")
    journal.save(1, {"hidden": torch.ones(64)})
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    assert journal.load() is None


def test_a_file_of_something_else_counts_as_none(tmp_path: Path) -> None:
    save_file({"hidden": torch.ones(1)}, tmp_path / "scoring.safetensors")
    assert PassJournal(tmp_path, "scoring").load() is None


def test_saves_first_last_and_while_it_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    journal = PassJournal(tmp_path, "scoring", share=0.25)

    def slow_save(*arguments: Any, **options: Any) -> None:
        now[0] += 10
        save_file(*arguments, **options)

    def finished_after(block: int, *, seconds: float, last: bool = False) -> int:
        now[0] += seconds
        journal.save(block, {}, last=last)
        saved = journal.load()
        assert saved is not None
        return saved.finished

    monkeypatch.setattr(journal_module, "save_file", slow_save)
    assert finished_after(1, seconds=1) == 1
    assert finished_after(2, seconds=28) == 1
    assert finished_after(3, seconds=1) == 3
    assert finished_after(4, seconds=1) == 3
    assert finished_after(5, seconds=1, last=True) == 5
