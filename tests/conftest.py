from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from families import Recipe, sample_text
from hypothesis import settings

from spinecli.checkpoints.checkpoint import Checkpoint

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that none of them is left over for one process at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The directory of a recipe's checkpoint, written once per session. Tests must not change it."""
    directories: dict[Recipe, Path] = {}

    def write(recipe: Recipe) -> Path:
        if recipe not in directories:
            directories[recipe] = recipe.write(tmp_path_factory.mktemp("checkpoint") / recipe.family)
        return directories[recipe]

    return write


@pytest.fixture(scope="session")
def opened(written: Callable[[Recipe], Path]) -> Callable[[Recipe], Checkpoint]:
    """The opened checkpoint of a recipe."""
    return lambda recipe: Checkpoint.open(written(recipe))


@pytest.fixture(scope="session")
def sample_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in the language of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("texts") / "sample.txt"
    path.write_text(sample_text())
    return path
