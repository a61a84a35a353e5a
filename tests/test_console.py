from __future__ import annotations

import io
from pathlib import Path

import pytest
import typer
from rich.console import Console

from spinecli.artifacts.directory import OutputOptions, work_directory
from spinecli.console import Terminal


def interrupted(resumable: Path | None) -> str:
    """What a command says that is stopped by Ctrl-C."""
    written = io.StringIO()
    terminal = Terminal(resumable=resumable, err=Console(file=written))
    with pytest.raises(typer.Exit) as ended, terminal.reporting_errors():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    return written.getvalue().strip()


def test_an_interruption_promises_to_resume_only_what_has_begun(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert interrupted(out) == interrupted(None) == "error: Stopped."
    with pytest.raises(RuntimeError), work_directory(OutputOptions(out), {}):
        raise RuntimeError
    assert interrupted(out) == "error: Stopped; the same command with --resume goes on from here."
    assert interrupted(tmp_path / "other") == "error: Stopped."
