from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import Recipe
from small_splits import SplitMaker


@pytest.fixture
def splits(tmp_path: Path, written: Callable[[Recipe], Path]) -> SplitMaker:
    return SplitMaker(tmp_path, written)
