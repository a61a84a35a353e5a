from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spine_process import Finished, Here, Step, run_step
from tiny_llama import made_up_text, write_tiny_llama
from typer.testing import CliRunner


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def spine_here() -> Here:
    """Runs `spine` in this process, which spares the seconds that importing torch takes."""

    def run(*arguments: object) -> Finished:
        from spinecli.app import app

        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Finished(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(made_up_text(8000))
    return path


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="session")
def pruned(chain_folder: Path, dense: Path, text: Path) -> Step:
    """One block of six and a quarter of the heads leave, so that the result is written as a Mistral."""
    calibration = ("--calibration", text, "--calibration-rows", 16, "--calibration-length", 32)
    return run_step(
        chain_folder / "pruned",
        "prune",
        dense,
        "--sparsity",
        0.4,
        "--method",
        "comp",
        "--block-share",
        0.5,
        *calibration,
        "--json",
    )


@pytest.fixture(scope="session")
def tuned(chain_folder: Path, pruned: Step) -> Step:
    return run_step(chain_folder / "tuned", "tune", pruned.out)
