"""`spine eval`: measure models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands import options
from spinecli.console import Terminal, table
from spinecli.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Group

    from spinecli.evaluation.models import Subject
    from spinecli.evaluation.results import Evaluation
    from spinecli.evaluation.settings import PerplexitySettings, TaskSettings

_TEXT = "Perplexity"
_TASK = "lm-eval tasks"
_GENERATION = "Speed and memory"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub id, or builtin:tiny.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="Another model to compare with; repeatable. Ratios are to the first."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="A PEFT adapter to put on MODEL.")] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            "--perplexity",
            help="Text to measure perplexity on: a .txt or .jsonl file, a hub data set, builtin:NAME; repeatable.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", help="Tokens in a window. Default: 256.", min=2, rich_help_panel=_TEXT),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            help="Tokens from one window to the next. Default: the window, so that none overlap.",
            min=1,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", help="At most this many windows. Default: 40.", min=1, rich_help_panel=_TEXT),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Tasks by name, separated by commas.", rich_help_panel=_TASK)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Directory with task files of yours.", rich_help_panel=_TASK)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="First examples of each task.", min=1, rich_help_panel=_TASK)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Examples in the prompt.", min=0, rich_help_panel=_TASK)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Requests at a time. Default: 8.", min=1, rich_help_panel=_TASK)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Chooses few-shot examples. Default: 1234, as lm-eval.", min=0, rich_help_panel=_TASK
        ),
    ] = None,
    latency: Annotated[
        bool,
        typer.Option("--latency", help="Measure prefill and decode speed.", rich_help_panel=_GENERATION),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Measure peak memory, in a fresh process a model.", rich_help_panel=_GENERATION),
    ] = False,
    prompt_length: Annotated[
        int | None,
        typer.Option(
            "--prompt-length", help="Tokens before generation. Default: 128.", min=1, rich_help_panel=_GENERATION
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Tokens generated.", min=2, rich_help_panel=_GENERATION)
    ] = 32,
    sequences: Annotated[
        int, typer.Option("--sequences", help="Sequences generated together.", min=1, rich_help_panel=_GENERATION)
    ] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Timed rounds, after one to warm up.", min=1, rich_help_panel=_GENERATION)
    ] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads to compute with. Default: torch's choice.", min=1)
    ] = None,
    device: options.Device = "cpu",
    dtype: options.ComputeDtype = options.Dtype.float32,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for results.json, report.html and a picture.")
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure models side by side: perplexity, lm-eval tasks, speed and memory.

    With no measure named: perplexity on a built-in text, and speed.

    [bold]spine eval tuned/ --against dense/ --perplexity text.txt --latency --out results/[/bold]
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        text_options = {"window": window, "stride": stride, "rows": rows}
        task_options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "seed": seed}
        unasked = not (perplexity or tasks is not None or latency or memory)
        _require_measure("--perplexity", bool(perplexity) or unasked, text_options)
        _require_measure("--tasks", tasks is not None, {**task_options, "include_path": include_path})

        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.evaluation.models import default_text, open_subjects
        from spinecli.evaluation.output import provenance, write_evaluation
        from spinecli.evaluation.session import Listeners, open_session
        from spinecli.evaluation.settings import GenerationSettings, Settings

        output = OutputOptions(out, overwrite=overwrite) if out else None
        if output:
            check_output(output)
        subjects = open_subjects([*((other, None) for other in against or ()), (model, adapter)])
        if unasked:
            perplexity, latency = [default_text(subjects[-1])], True
            terminal.note(f"No measure was named: perplexity on {perplexity[0]}, and speed.")
        if not against:
            _suggest_reference(terminal, subjects[-1])
        settings = Settings(
            perplexity=_text_settings(perplexity, text_options),
            tasks=_task_settings(tasks, include_path, task_options),
            latency=latency,
            memory=memory,
            generation=GenerationSettings(
                prompt_length=prompt_length, new_tokens=new_tokens, batch_size=sequences, repeats=repeats
            ),
            device=device,
            dtype=dtype.value,
            threads=threads,
        )
        with terminal.progress() as progress:
            session = open_session(subjects, settings, Listeners(progress, terminal.note, debug))
            source = provenance(session) if output else None
            evaluation = session.measure()
        if output and source:
            manifest = write_evaluation(session, source, evaluation, output)
            terminal.note(f"Wrote {', '.join(manifest.outputs)} to {output.path}.")
        terminal.result(evaluation.model_dump(mode="json"), comparison_table(evaluation))


def _require_measure(measure: str, asked: bool, given: Mapping[str, object]) -> None:
    """Refuse options of a measure that is not taken."""
    if asked:
        return
    for name, value in given.items():
        if value is not None:
            raise OptionError(f"--{name.replace('_', '-')} belongs to {measure}, which was not asked for; add it.")


def _text_settings(texts: list[str] | None, given: dict[str, int | None]) -> PerplexitySettings | None:
    from spinecli.evaluation.settings import PerplexitySettings

    if not texts:
        return None
    return PerplexitySettings.model_validate({"texts": texts, **_named(given)})


def _task_settings(names: str | None, include_path: Path | None, given: dict[str, int | None]) -> TaskSettings | None:
    from spinecli.evaluation.settings import TaskSettings

    if names is None:
        return None
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise OptionError("--tasks names no task; write names separated by commas.")
    return TaskSettings.model_validate({"names": wanted, "include_path": include_path, **_named(given)})


def _named(given: dict[str, int | None]) -> dict[str, int]:
    """The options that were given; the settings know the defaults of the others."""
    return {name: value for name, value in given.items() if value is not None}


def _suggest_reference(terminal: Terminal, subject: Subject) -> None:
    from spinecli.evaluation.models import dense_reference

    dense = dense_reference(subject)
    if dense:
        terminal.note(f"--against {dense} would compare with the checkpoint that {subject.label} was made from.")


def comparison_table(evaluation: Evaluation) -> Group:
    """One line a figure; beside every model but the first, its ratio to the first. How it was measured stands below."""
    from rich.console import Group
    from rich.text import Text

    from spinecli.evaluation.wording import cell, conditions, ratio_cell

    columns, rows = [""], [[row.figure] for row in evaluation.comparison]
    for index, result in enumerate(evaluation.models):
        columns += [result.label] if index == 0 else [result.label, "×"]
        for line, row in zip(rows, evaluation.comparison, strict=True):
            line += [cell(row, index)] if index == 0 else [cell(row, index), ratio_cell(row, index)]
    # not the table's own caption, which would be wrapped to the table's width
    return Group(table("", columns, rows), Text("\n".join(conditions(evaluation)), style="dim"))
