from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import Recipe
from small_federations import Maker


@pytest.fixture
def requests(tmp_path: Path, written: Callable[[Recipe], Path]) -> Maker:
    return Maker(tmp_path, written)
