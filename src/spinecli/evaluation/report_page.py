"""report.html of an evaluation: what came of it, quality against size, all figures, and how to do it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from spinecli.checkpoints.cut_picture import BlockCut
from spinecli.evaluation.findings import cut_in_words, findings, is_quality, quality_rows
from spinecli.evaluation.page.page import (
    Answers,
    Cell,
    Command,
    Cut,
    CutRow,
    FigureTable,
    Group,
    KeptUnits,
    Page,
    Row,
    page_html,
)
from spinecli.evaluation.page.plot import Plot, Point
from spinecli.evaluation.report import cell, conditions, formatted, ratio_cell
from spinecli.evaluation.results import ComparisonRow, Evaluation, ModelResult
from spinecli.healing.curve import Curve

_MOST_PLOTS = 7
# Within half a percent nothing is called better or worse.
_UNDECIDED = 0.005


def report_html(evaluation: Evaluation, started: str, commands: Sequence[Command] = ()) -> str:
    """The report as one HTML document.

    Args:
        started: the time of the measurement.
        commands: the way to the models and to this evaluation.
    """
    return page_html(_page(evaluation, started, commands))


def cut_of_model(label: str, cut: Sequence[BlockCut]) -> Cut:
    """What every block keeps; neighbours that were cut alike share a line."""
    rows = []
    for (heads, channels), run in groupby(enumerate(cut), key=lambda numbered: _units(numbered[1])):
        numbers = [number for number, _ in run]
        rows.append(CutRow(numbers[0], numbers[-1], heads, channels))
    return Cut(label, f"Keeps {cut_in_words(cut)}.", tuple(rows))


def _units(block: BlockCut) -> tuple[KeptUnits, KeptUnits]:
    return KeptUnits(block.heads, block.of_heads), KeptUnits(block.channels, block.of_channels)


def _page(evaluation: Evaluation, started: str, commands: Sequence[Command]) -> Page:
    labels = tuple(model.label for model in evaluation.models)
    return Page(
        title="Evaluation of " + ", ".join(labels),
        findings=findings(evaluation),
        plots=(*_plots(evaluation), *_curves(evaluation.models)),
        tables=(FigureTable("", labels, _groups(evaluation.comparison)),),
        conditions=tuple(conditions(evaluation)),
        cuts=tuple(cut_of_model(model.label, model.cut) for model in evaluation.models if model.cut),
        answers=_answers(evaluation.models),
        commands=tuple(commands),
        facts=_facts(evaluation, started),
    )


def _plots(evaluation: Evaluation) -> tuple[Plot, ...]:
    """Every figure of quality against the parameters; where there is none, speed. A model alone needs no plot."""
    if len(evaluation.models) == 1:
        return ()
    rows = quality_rows(evaluation)
    if not rows:
        rows = [row for row in evaluation.comparison if row.form == "rate" and "prefill" not in row.figure][:1]
    return tuple(_plot(evaluation.models, row) for row in rows[:_MOST_PLOTS])


def _plot(models: Sequence[ModelResult], row: ComparisonRow) -> Plot:
    direction = {"lower": "lower is better", "higher": "higher is better", "neither": ""}[row.better]
    points = []
    for index, (model, value) in enumerate(zip(models, row.values, strict=True)):
        if value is None:
            continue
        parameters = formatted(model.weights.parameters, "count")
        said = f"{model.label}: {row.figure} {cell(row, index)}, {parameters} parameters"
        points.append(
            Point(
                name=model.label,
                x=model.weights.parameters / 1e6,
                y=value,
                said=said,
                value=cell(row, index),
                series=0 if index == 0 else 1,
            )
        )
    name, _, text = row.figure.partition(", ")
    figure = f"{name} on {text}" if text and row.form != "rate" else row.figure
    return Plot(
        title=f"Size and {figure}",
        x_title="million parameters",
        y_title=f"{row.figure if row.form == 'rate' else name}, {direction}",
        points=tuple(points),
        y_percent=row.form == "share",
    )


def _curves(models: Sequence[ModelResult]) -> Iterator[Plot]:
    for model in models:
        if model.healing:
            yield _curve(model.label, model.healing)


def _curve(label: str, curve: Curve) -> Plot:
    """Held-out rows over what was trained on, joined from the weights that came in."""
    points = tuple(
        Point(
            name=f"{judged.tokens:,} tokens",
            x=judged.tokens / 1e6,
            y=judged.held_out,
            said=f"{judged.held_out:.4f} on held-out rows after {judged.tokens:,} tokens",
            label=f"{judged.held_out:.4f}",
            named=judged in (curve.curve[0], curve.curve[-1]),
            series=1 if judged.tokens else 0,
        )
        for judged in curve.curve
    )
    return Plot(
        title=f"Healing of {label}",
        x_title="million tokens",
        y_title=f"{curve.lowered} on held-out rows, nats",
        points=points,
        series=("before", "healed"),
    )


def _groups(rows: Sequence[ComparisonRow]) -> tuple[Group, ...]:
    grouped: dict[str, list[Row]] = {"Quality": [], "Speed": [], "Memory": [], "Size": []}
    for row in rows:
        kind = "Quality" if is_quality(row) else "Speed" if row.form == "rate" else _kind_of_size(row)
        grouped[kind].append(Row(row.figure, tuple(_cell(row, index) for index in range(len(row.values)))))
    return tuple(Group(name, tuple(found)) for name, found in grouped.items() if found)


def _kind_of_size(row: ComparisonRow) -> str:
    return "Memory" if "memory" in row.figure or row.figure.startswith("of this") else "Size"


def _cell(row: ComparisonRow, index: int) -> Cell:
    ratio = row.ratios[index]
    if index == 0 or ratio is None:
        return Cell(cell(row, index))
    better = ratio > 1 if row.better == "higher" else ratio < 1
    judged = row.better != "neither" and abs(ratio - 1) > _UNDECIDED
    return Cell(cell(row, index), f"× {ratio_cell(row, index)}", ("good" if better else "bad") if judged else "")


def _answers(models: Sequence[ModelResult]) -> tuple[Answers, ...]:
    """By prompt; models that say the same share a line."""
    by_prompt: dict[str, dict[str, list[str]]] = {}
    for model in models:
        for said in model.continuations:
            by_prompt.setdefault(said.prompt, {}).setdefault(said.text or "(ends here)", []).append(model.label)
    return tuple(
        Answers(prompt, tuple((", ".join(labels), text) for text, labels in answers.items()))
        for prompt, answers in by_prompt.items()
    )


def _facts(evaluation: Evaluation, started: str) -> tuple[tuple[str, str], ...]:
    models = [
        (model.label, model.reference + (f" with the adapter {model.adapter}" if model.adapter else ""))
        for model in evaluation.models
    ]
    machine = [(name, str(value)) for name, value in evaluation.machine.items() if value is not None]
    return (*models, ("measured", started), *machine)
