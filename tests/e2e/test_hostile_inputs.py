"""Whatever is wrong with the input: exit code 2, one sentence that names it, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_cases import CASES, Case, Workshop, inapplicable, tree
from spine_process import Finished, Here, Step, spine
from tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "sharded", sharded=True)


@pytest.fixture
def shop(tmp_path: Path, dense: Path, sharded: Path, pruned: Step, text: Path) -> Workshop:
    return Workshop(tmp_path, dense, sharded, pruned.out, text)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_sentence_and_nothing_written(case: Case, shop: Workshop, spine_here: Here) -> None:
    if reason := inapplicable(case):
        pytest.skip(reason)
    arguments = case.build(shop)
    before = tree(shop.folder)
    done: Finished = (spine_here if case.in_process else spine)(*arguments)
    assert done.code == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(".")
    for name in case.names:
        assert name in lines[0]
    assert tree(shop.folder) == before
