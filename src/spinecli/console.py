"""What a person sees: tables and results on stdout, progress and notes on stderr, errors as one sentence."""

from __future__ import annotations

import json as json_module
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from spinecli.errors import SpineError, reason_of

if TYPE_CHECKING:
    from spinecli.artifacts.context import RunContext
    from spinecli.artifacts.stopwatch import Stopwatch

_INTERRUPTED = 130
# Libraries that read what a user gives.
_LIBRARIES = ("transformers", "tokenizers", "peft", "datasets", "lm_eval", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Terminal:
    """Where a command's words go, by the options every command shares.

    Args:
        json: stdout carries one JSON object and nothing else.
        quiet: no progress and no notes.
        debug: errors come with their traceback.
        resumable: the output of a command that has --resume; an interruption points to it if a run of it has begun.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    resumable: Path | None = None
    out: Console = field(default_factory=lambda: Console(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def note(self, text: str) -> None:
        """One line about what is happening, unless quiet."""
        if not self.quiet:
            self.err.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def result(self, value: Any, *renderables: Any) -> None:
        """The command's result: `value` for a program (--json), the renderables for a person."""
        if self.json:
            sys.stdout.write(json_module.dumps(value, indent=2, ensure_ascii=False) + "\n")
            return
        for renderable in renderables:
            is_text = isinstance(renderable, str)
            self.out.print(renderable, markup=not is_text, soft_wrap=is_text)

    @contextmanager
    def context(self, stopwatch: Stopwatch | None = None) -> Iterator[RunContext]:
        """What library code is given: it draws a bar a phase on a terminal, and nothing where there is none.

        Args:
            stopwatch: of a run that has begun; without one, time counts from here.
        """
        from spinecli.artifacts.context import RunContext
        from spinecli.artifacts.stopwatch import Stopwatch

        context = RunContext(stopwatch or Stopwatch(), note=self.note, debug=self.debug)
        if self.quiet or not self.err.is_terminal:
            yield context
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.err, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def update(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done, total=total)

            yield replace(context, progress=update)

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Render what goes wrong inside as one sentence and leave with the error's exit code."""
        try:
            with self._noting_what_the_library_says(), _interrupts_kept():
                yield
        except SpineError as error:
            self._fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            hint = "; the same command with --resume goes on from here" if self._unfinished() else ""
            self._fail(f"Stopped{hint}.", _INTERRUPTED)
        except MemoryError:
            self._fail("Out of memory; take fewer or shorter rows of text, or a machine with more.", 1)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            self._fail(f"{error.strerror or error}{place}.", 1)
        except Exception as error:
            # a library's own reason is what helps; a traceback through spine alone is spine's fault and stays one
            if (library := _library_in(error.__traceback__)) is None:
                raise
            reason = reason_of(error)
            self._fail(f"{library} stopped: {reason}; --debug shows where.", 1)

    @contextmanager
    def _noting_what_the_library_says(self) -> Iterator[None]:
        """What library code logs inside becomes notes, each of them once."""
        logger, handler = logging.getLogger("spinecli"), _Notes(self)
        propagated, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagated

    def _unfinished(self) -> bool:
        from spinecli.artifacts.directory import is_unfinished

        return self.resumable is not None and is_unfinished(self.resumable)

    def _fail(self, sentence: str, code: int) -> None:
        if self.debug:
            self.err.print_exception()
        self.err.print(f"[red]error:[/red] {escape(sentence)}", soft_wrap=True)
        raise typer.Exit(code) from None


def _library_in(traceback: TracebackType | None) -> str | None:
    """The first of the libraries that read what a user gives in which an error was raised; None if it is elsewhere."""
    while traceback is not None:
        package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _LIBRARIES:
            return package
        traceback = traceback.tb_next
    return None


class _Notes(logging.Handler):
    """Hands messages to a terminal, none of them twice: a command may open the same checkpoint several times."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            self._terminal.note(message)


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Ctrl-C ends what is enclosed by a KeyboardInterrupt, also where torch's C code makes another error of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


# Between columns.
_GAP = 2


class CalmTable(Table):
    """A table whose words stay whole where the terminal is wide enough for the longest of every column."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Fold anywhere on a terminal that is too narrow, since what does not fit would be left out."""
        needed = sum(column.min_width or 0 for column in self.columns) + _GAP * (len(self.columns) - 1)
        if needed > options.max_width:
            for column in self.columns:
                column.min_width = None
        yield from super().__rich_console__(console, options)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "", words: Sequence[int] = (0,)
) -> CalmTable:
    """A calm table with an optional line below; columns of words are left-aligned, columns of figures right-aligned."""
    drawn = CalmTable(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        texts = (column, *(row[index] for row in rows))
        whole = max((cell_len(word) for text in texts for word in text.split()), default=0)
        drawn.add_column(
            escape(column), justify="left" if index in words else "right", overflow="fold", min_width=whole
        )
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    if note:
        drawn.caption = escape(note)
        drawn.caption_justify = "left"
    return drawn


def size(count: float) -> str:
    """Bytes as a person reads them: 8.16 MB."""
    return _with_unit(count, (" B", " kB", " MB", " GB"))


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def number(count: float) -> str:
    """Large counts with a suffix: 7.15M."""
    return _with_unit(count, ("", "k", "M", "G"))


def _with_unit(count: float, units: Sequence[str]) -> str:
    """The count in the largest unit of which it has at least one; whole in the first unit, two digits in the others."""
    power = 0
    while count >= 1000 and power + 1 < len(units):
        count, power = count / 1000, power + 1
    return f"{count:.{2 if power else 0}f}{units[power]}"
