from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import typer
from rich.console import Console

from spinecli.artifacts.directory import OutputOptions, work_directory
from spinecli.console import Terminal, table


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


def said_of(error: Exception | None = None, *notes: str, quiet: bool = False) -> tuple[str, int]:
    """What stands on stderr, and the exit code, of a command in which notes are logged and an error escapes."""
    written = io.StringIO()
    terminal = Terminal(quiet=quiet, err=Console(file=written, width=200))
    code = 0
    try:
        with terminal.reporting_errors():
            for note in notes:
                logging.getLogger("spinecli.anywhere").warning(note)
            if error is not None:
                raise error
    except typer.Exit as ended:
        code = ended.exit_code
    return written.getvalue().strip(), code


def test_what_library_code_logs_is_a_note_and_said_once() -> None:
    assert said_of(None, "one thing", "another", "one thing") == ("one thing\nanother", 0)
    assert said_of(None, "one thing", quiet=True) == ("", 0)


def test_an_error_out_of_a_library_is_a_sentence_with_its_reason() -> None:
    from transformers import AutoConfig

    written = io.StringIO()
    with pytest.raises(typer.Exit) as ended, Terminal(err=Console(file=written, width=200)).reporting_errors():
        AutoConfig.for_model("no such model")
    assert ended.value.exit_code == 1
    assert written.getvalue().startswith("error: transformers stopped: Unrecognized model identifier: no such model")


def test_an_error_of_spines_own_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        said_of(ZeroDivisionError("a mistake in spine"))


@pytest.mark.parametrize(("width", "whole"), [(80, True), (30, False)])
def test_words_stay_whole_where_there_is_room_and_no_figure_is_left_out(width: int, whole: bool) -> None:
    written = io.StringIO()
    row = ("self_attn.o_proj", "conjugate gradients, round 3", "0.1231", "0.0324", "74%", "a longer remark here")
    drawn = table("", ("layer", "answer", "before", "after", "recovered", "remark"), [row], words=(0, 1, 5))
    Console(file=written, width=width).print(drawn)
    said = written.getvalue()
    assert max(map(len, said.splitlines())) <= width
    assert ("self_attn.o_proj" in said) == whole
    assert "".join(said.split()).count("%") == 1
