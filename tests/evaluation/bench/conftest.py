from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import recipe
from written_gguf import write_gguf_file

from spinecli.exports.config import Quantization


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe("llama", grouped=True, channels=64).write(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def thinner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe("llama", grouped=True, channels=32, seed=1).write(tmp_path_factory.mktemp("models") / "thinner")


@pytest.fixture(scope="session")
def gguf_file(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` as a file for llama.cpp, with nothing rounded."""
    return write_gguf_file(dense, tmp_path_factory.mktemp("files") / "dense.gguf", Quantization.f32)
