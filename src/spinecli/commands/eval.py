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
    from spinecli.evaluation.settings import LabelledConfig, PerplexityConfig, TaskConfig
if TYPE_CHECKING:
    from rich.console import Group

    from spinecli.evaluation.models import Subject
    from spinecli.evaluation.results import Evaluation


def require_measure(measure: str, asked: bool, given: Mapping[str, object]) -> None:
    """Refuse options of a measure that is not taken."""
    if asked:
        return
    for name, value in given.items():
        if value is not None:
            raise OptionError(f"--{name.replace('_', '-')} belongs to {measure}, which was not asked for; add it.")


def text_settings(texts: list[str] | None, given: Mapping[str, object]) -> PerplexityConfig | None:
    """How perplexity is taken; None if no text is named."""
    from spinecli.choice import choice
    from spinecli.data.config import SpecialTokens
    from spinecli.evaluation.settings import PerplexityConfig

    if (special := given.get("special_tokens")) is not None:
        choice("--special-tokens", SpecialTokens, str(special))
    return PerplexityConfig.model_validate({"texts": texts, **_named(given)}) if texts else None


def task_settings(names: str | None, include_path: Path | None, given: Mapping[str, object]) -> TaskConfig | None:
    """What lm-eval runs; None if --tasks is not given."""
    from spinecli.evaluation.settings import TaskConfig

    if names is None:
        return None
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise OptionError("--tasks names no task; write names separated by commas.")
    return TaskConfig.model_validate({"names": wanted, "include_path": include_path, **_named(given)})


def labelled_settings(data: str | None, given: Mapping[str, object]) -> LabelledConfig | None:
    """Which examples classifiers answer; None if --labelled is not given."""
    from spinecli.evaluation.settings import LabelledConfig

    return None if data is None else LabelledConfig.model_validate({"data": data, **_named(given)})


def _named(given: Mapping[str, object]) -> dict[str, object]:
    """The options that were given; the settings know the defaults of the others."""
    return {name: value for name, value in given.items() if value is not None}


_TEXT = "Perplexity"
_TASK = "lm-eval tasks"
_LABELLED = "Classification"
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
            help="Text to measure perplexity on: a .txt, .jsonl or .csv file, hub data set, builtin:NAME; repeatable.",
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
    special_tokens: Annotated[
        str | None,
        typer.Option(
            "--special-tokens",
            help="auto: every window begins as the tokenizer begins a text; none: with text. Default: auto.",
            rich_help_panel=_TEXT,
        ),
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
    labelled: Annotated[
        str | None,
        typer.Option(
            "--labelled",
            metavar="DATA",
            help="Labelled examples to measure classifiers on: a file, a directory, a hub data set, "
            "builtin:tiny-topics.",
            rich_help_panel=_LABELLED,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="Column of the text. Default: by its name.", rich_help_panel=_LABELLED),
    ] = None,
    pair_column: Annotated[
        str | None,
        typer.Option("--pair-column", help="Column of a second text, if there is one.", rich_help_panel=_LABELLED),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", help="Column of the label. Default: by its name.", rich_help_panel=_LABELLED),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Longest row in tokens. Default: 128.", min=2, rich_help_panel=_LABELLED),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            help="At most so many, spread evenly over the data. Default: 2000.",
            min=1,
            rich_help_panel=_LABELLED,
        ),
    ] = None,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency", help="Measure speed: prefill and decode, or forward passes.", rich_help_panel=_GENERATION
        ),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Measure peak memory, in a fresh process a model.", rich_help_panel=_GENERATION),
    ] = False,
    prompt_length: Annotated[
        int | None,
        typer.Option(
            "--prompt-length",
            help="Tokens before generation, or of a classifier's row. Default: 128.",
            min=1,
            rich_help_panel=_GENERATION,
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Tokens generated.", min=2, rich_help_panel=_GENERATION)
    ] = 32,
    sequences: Annotated[
        int,
        typer.Option(
            "--sequences", help="Sequences generated or classified together.", min=1, rich_help_panel=_GENERATION
        ),
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
    """Measure models side by side: perplexity, lm-eval tasks, labelled examples, speed and memory.

    With no measure named: speed, and of language models perplexity on a built-in text.

    [bold]spine eval tuned/ --against dense/ --perplexity text.txt --latency --out results/[/bold]

    [bold]spine eval joined/ --against other/ --labelled reviews/ --latency --out results/[/bold]
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        text_options = {"window": window, "stride": stride, "rows": rows, "special_tokens": special_tokens}
        task_options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "seed": seed}
        columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
        label_options = {**columns, "max_length": max_length, "examples": examples}
        unasked = not (perplexity or tasks is not None or labelled is not None or latency or memory)
        require_measure("--perplexity", bool(perplexity) or unasked, text_options)
        require_measure("--tasks", tasks is not None, {**task_options, "include_path": include_path})
        require_measure("--labelled", labelled is not None, label_options)

        asked_tasks = task_settings(tasks, include_path, task_options)
        if asked_tasks is not None:
            from spinecli.evaluation.task_names import expand_names

            # before the models, and all that is imported for them: a misspelt name is told at once
            expand_names(asked_tasks)

        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.evaluation.models import default_text, open_subjects
        from spinecli.evaluation.output import provenance, write_evaluation
        from spinecli.evaluation.session import Listeners, open_session
        from spinecli.evaluation.settings import EvaluateConfig, GenerationConfig

        output = OutputOptions(out, overwrite=overwrite) if out else None
        if output:
            check_output(output)
        subjects = open_subjects([*((other, None) for other in against or ()), (model, adapter)])
        if unasked:
            latency = True
            if subjects[-1].classifies:
                require_measure("--perplexity", False, text_options)
                terminal.note("No measure was named: speed only; --labelled DATA would measure accuracy and loss.")
            else:
                perplexity = [default_text(subjects[-1])]
                terminal.note(f"No measure was named: perplexity on {perplexity[0]}, and speed.")
        if not against:
            _suggest_reference(terminal, subjects[-1])
        settings = EvaluateConfig(
            perplexity=text_settings(perplexity, text_options),
            tasks=asked_tasks,
            labelled=labelled_settings(labelled, label_options),
            latency=latency,
            memory=memory,
            generation=GenerationConfig(
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


def _suggest_reference(terminal: Terminal, subject: Subject) -> None:
    from spinecli.evaluation.models import dense_reference

    dense = dense_reference(subject)
    if dense:
        terminal.note(f"--against {dense} would compare with the checkpoint that {subject.label} was made from.")


def comparison_table(evaluation: Evaluation) -> Group:
    """One line a figure; beside every model but the first, its ratio to the first. How it was measured stands below."""
    from rich.console import Group
    from rich.text import Text

    from spinecli.evaluation.report import cell, conditions, ratio_cell

    columns, rows = [""], [[row.figure] for row in evaluation.comparison]
    for index, result in enumerate(evaluation.models):
        columns += [result.label] if index == 0 else [result.label, "×"]
        for line, row in zip(rows, evaluation.comparison, strict=True):
            line += [cell(row, index)] if index == 0 else [cell(row, index), ratio_cell(row, index)]
    # not the table's own caption, which would be wrapped to the table's width
    return Group(table("", columns, rows), Text("\n".join(conditions(evaluation)), style="dim"))
