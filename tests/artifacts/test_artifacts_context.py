from __future__ import annotations

from pathlib import Path

import torch

from spinecli.artifacts.context import RunContext


def test_every_run_counts_its_own_time() -> None:
    one, other = RunContext(), RunContext()
    with one.stopwatch("computing"):
        pass
    assert "computing" in one.stopwatch.measured().seconds
    assert "computing" not in other.stopwatch.measured().seconds


def test_a_run_that_is_told_nothing_hears_nothing_and_keeps_nothing() -> None:
    context = RunContext()
    context.progress("scoring", 1, 2)
    context.note("a sentence")
    assert context.journal("scoring") is None


def test_passes_of_one_run_keep_their_journals_side_by_side(tmp_path: Path) -> None:
    context = RunContext(state=tmp_path)
    for finished, name in enumerate(("scoring", "tuning"), start=1):
        journal = context.journal(name)
        assert journal
        journal.save(finished, {"hidden": torch.ones(1)})
    again = [RunContext(state=tmp_path).journal(name) for name in ("scoring", "tuning")]
    saved = [journal.load() for journal in again if journal]
    assert [found.finished for found in saved if found] == [1, 2]
