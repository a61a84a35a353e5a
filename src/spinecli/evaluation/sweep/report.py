"""A sweep in words, and the curve of quality against size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinecli.artifacts.picture_file import save_figure
from spinecli.evaluation.page.page import Cell, Command, FigureTable, Finding, Group, Page, Row, page_html
from spinecli.evaluation.page.plot import Plot, Point
from spinecli.evaluation.report import formatted, windows_in_words
from spinecli.evaluation.sweep.results import SweepResults, SweepRow

PICTURE_NAME = "curve.png"

_COLOURS = ("#4472c4", "#ed7d31", "#70ad47", "#7f7f7f", "#a855b5", "#c9a400", "#17a2a2")
_MARKERS = "osD^vPX"
_DENSE = "black"
# From this span on a curve's low end would be flat on a linear axis.
_LOGARITHMIC_FROM = 4


@dataclass(frozen=True)
class _Panel:
    title: str
    x_label: str
    y_label: str
    x: Callable[[SweepRow], float]
    y: Callable[[SweepRow], float]


def save_curve(results: SweepResults, path: Path) -> None:
    """Draw a row of panels a text: against parameters, and against decode speed where that was measured.

    One line a method, the dense model as a point. Of models without perplexity, what their calibration rows say.
    """
    from matplotlib.figure import Figure

    rows = _panels(results)
    across, down = len(rows[0]), len(rows)
    figure = Figure(figsize=(5.2 * across, 4.0 * down), layout="constrained")
    for axes, panels in zip(figure.subplots(down, across, squeeze=False), rows, strict=True):
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel, results)
    save_figure(figure, path)


def _panels(results: SweepResults) -> list[list[_Panel]]:
    def worth(text: str) -> Callable[[SweepRow], float]:
        return lambda row: row.perplexity[text]

    measures = [
        (windows.description, "perplexity, lower is better", worth(text)) for text, windows in results.texts.items()
    ] or [("calibration rows held out", results.held_out_by, lambda row: row.held_out)]
    found = []
    for title, label, y in measures:
        panels = [_Panel(title, "million parameters", label, lambda row: row.parameters / 1e6, y)]
        if results.dense.speed:
            panels.append(_Panel(title, "decode speed, × that of the dense model", label, _decode_ratio, y))
        found.append(panels)
    return found


def _decode_ratio(row: SweepRow) -> float:
    return row.speed.decode_ratio if row.speed else 1.0


def _draw(axis: Any, panel: _Panel, results: SweepResults) -> None:
    lines: dict[str, list[SweepRow]] = {}
    for row in results.points:
        lines.setdefault(row.method or "", []).append(row)
    for number, (method, rows) in enumerate(lines.items()):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        chain = [results.dense, *rows]
        axis.plot(list(map(panel.x, chain)), list(map(panel.y, chain)), "-", color=colour, lw=1.2, alpha=0.8, zorder=2)
        label = method + (f", tuned by {rows[0].tuned}" if rows[0].tuned else "")
        axis.plot(
            list(map(panel.x, rows)),
            list(map(panel.y, rows)),
            marker,
            color=colour,
            label=label,
            ms=max(4, 8 - number),
            zorder=3,
        )
        if number == 0:
            _name_ratios(axis, panel, rows)
    axis.plot(panel.x(results.dense), panel.y(results.dense), "*", color=_DENSE, label="dense", ms=11, zorder=4)
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    _scale(axis, [panel.y(row) for row in results.rows])
    axis.margins(0.08)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3, which="both")


def _name_ratios(axis: Any, panel: _Panel, rows: Sequence[SweepRow]) -> None:
    """The asked sparsity beside the first method's points; those of the others come in the same order."""
    for row in rows:
        axis.annotate(
            f"{100 * row.sparsity:.4g}%",
            (panel.x(row), panel.y(row)),
            textcoords="offset points",
            xytext=(0, -12),
            ha="center",
            fontsize=7,
        )


def _scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where values span decades, with plain numbers at its ticks."""
    if min(values) <= 0 or max(values) / min(values) < _LOGARITHMIC_FROM:
        return
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axis.set_yscale("log")
    subdivisions = (1.0, 2.0, 3.0, 5.0, 7.0) if max(values) / min(values) < 100 else (1.0, 3.0)
    axis.yaxis.set_major_locator(LogLocator(subs=subdivisions))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(LogLocator(subs="all"))
    axis.yaxis.set_minor_formatter("")


def columns(results: SweepResults) -> tuple[str, ...]:
    """Heads of the table."""
    several = len(results.texts) > 1
    heads = [f"perplexity,\n{text.description}" if several else "perplexity" for text in results.texts.values()]
    texts = [part for head in heads for part in (head, "×")]
    speeds = ["decode,\n×"] if results.dense.speed else []
    return ("", "removed", "parameters", "×", "FLOPs,\n×", "held-out", *texts, *speeds)


def conditions(results: SweepResults) -> list[str]:
    """How the figures were taken, one sentence each; without this they mean nothing."""
    sentences = ["Removed is the share of block parameters. Ratios are to the dense model."]
    sentences.append(f"Held-out: {results.held_out_by}, on calibration rows that recovery is not fitted to.")
    for text in results.texts.values():
        cut = windows_in_words(text.windows, text.window, text.stride, text.opened_by)
        sentences.append(f"Perplexity on {text.description}: {cut}.")
    if results.generation and results.machine:
        generation = results.generation
        sentences.append(
            f"Speed: {generation.prompt_length} + {generation.new_tokens} tokens, batch {generation.batch_size}, on "
            f"{results.machine['device']}, threads: {results.machine['threads']}; median of {generation.repeats} "
            "rounds, each model and the dense one in turns."
        )
    if tunings := _tunings(results.points):
        sentences.append(f"Tuned after the cut: {tunings}.")
    if results.heal_tokens:
        sentences.append(f"Every cut was healed on {results.heal_tokens:,} tokens, as by spine heal.")
    sentences += [f"{refusal.name} is left out: {refusal.reason}" for refusal in results.refused]
    return sentences


def _tunings(points: Sequence[SweepRow]) -> str:
    found = dict.fromkeys((row.method, row.tuned) for row in points if row.tuned)
    return ", ".join(f"{method} by {tuned}" for method, tuned in found)


# What a reader may take for a small loss of quality.
_SMALL_LOSS = 0.1
# With more points, only those of the method that costs most are named: above the others there is room.
_MOST_NAMED = 8


def sweep_html(results: SweepResults, commands: Sequence[Command] = ()) -> str:
    """The report as one HTML document, which says nothing of when it was made: a resumed sweep writes the same.

    Args:
        commands: the way to the model and to this sweep.
    """
    return page_html(
        Page(
            title=f"Sweep of {results.model}",
            findings=_findings(results),
            plots=_plots(results),
            tables=(_table(results),),
            conditions=tuple(conditions(results)),
            commands=tuple(commands),
            facts=tuple((name, str(value)) for name, value in (results.machine or {}).items() if value is not None),
        )
    )


def _findings(results: SweepResults) -> tuple[Finding, ...]:
    """The largest cut that costs little, else the one that costs least; then the largest of all."""
    name, worth = _measure(results)
    dense = worth(results.dense)
    if not results.points:
        return ()
    small = [row for row in results.points if dense > 0 and worth(row) <= dense * (1 + _SMALL_LOSS)]
    chosen = _largest(small, worth) if small else min(results.points, key=worth)
    about = f"is the largest cut within {_SMALL_LOSS:.0%} of the dense model" if small else "costs least of all"
    found = [Finding(chosen.name, f"{about}: {_in_words(chosen, results, name, worth)}")]
    largest = _largest(results.points, worth)
    if largest is not chosen:
        found.append(Finding(largest.name, f"cuts most: {_in_words(largest, results, name, worth)}"))
    return tuple(found)


def _largest(rows: Sequence[SweepRow], worth: Callable[[SweepRow], float]) -> SweepRow:
    """Of those that were asked to cut most, the one that is worth most."""
    most = max(row.sparsity for row in rows)
    return min((row for row in rows if row.sparsity == most), key=worth)


def _in_words(row: SweepRow, results: SweepResults, name: str, worth: Callable[[SweepRow], float]) -> str:
    dense, value = worth(results.dense), worth(row)
    change = f" ({value / dense - 1:+.1%})" if dense > 0 else ""
    removed = f"{row.achieved_sparsity:.1%} of the block parameters are gone"
    moved = f"{name} goes from {formatted(dense, 'score')} to {formatted(value, 'score')}{change}"
    speed = f"it generates {row.speed.decode_ratio:.2f} times as fast and " if row.speed else "it "
    taken = f"takes {formatted(row.bytes, 'bytes')} instead of {formatted(results.dense.bytes, 'bytes')}"
    return f"{removed}, {moved}, {speed}{taken}."


def _measure(results: SweepResults) -> tuple[str, Callable[[SweepRow], float]]:
    """What quality is here: perplexity on the first text, or what the calibration rows say."""
    for text, windows in results.texts.items():
        return f"perplexity on {windows.description}", _on(text)
    return results.held_out_by, lambda row: row.held_out


def _on(text: str) -> Callable[[SweepRow], float]:
    return lambda row: row.perplexity[text]


def _plots(results: SweepResults) -> tuple[Plot, ...]:
    measures = [(f"perplexity on {windows.description}", _on(text)) for text, windows in results.texts.items()]
    found = [_plot(results, name, worth) for name, worth in measures or [_measure(results)]]
    if results.dense.speed:
        found.append(_speed_plot(results, *_measure(results)))
    return tuple(found)


def _plot(results: SweepResults, name: str, worth: Callable[[SweepRow], float]) -> Plot:
    return Plot(
        title=f"Size and {name}",
        x_title="million parameters",
        y_title=f"{name.partition(' on ')[0]}, lower is better",
        points=_points(results, name, lambda row: row.parameters / 1e6, worth),
        series=_series(results),
    )


def _speed_plot(results: SweepResults, name: str, worth: Callable[[SweepRow], float]) -> Plot:
    return Plot(
        title=f"Speed and {name}",
        x_title="decode speed, × that of the dense model",
        y_title=f"{name.partition(' on ')[0]}, lower is better",
        points=_points(results, name, lambda row: row.speed.decode_ratio if row.speed else 1.0, worth),
        series=_series(results),
    )


def _points(
    results: SweepResults, name: str, x: Callable[[SweepRow], float], worth: Callable[[SweepRow], float]
) -> tuple[Point, ...]:
    series, named = _series(results), _named(results, worth)
    return tuple(
        Point(
            name=row.name,
            x=x(row),
            y=worth(row),
            said=f"{row.name}: {row.achieved_sparsity:.1%} removed, {name} {formatted(worth(row), 'score')}, "
            f"{formatted(row.parameters, 'count')} parameters",
            value=formatted(worth(row), "score"),
            label=_label(row),
            named=row.method is None or _method(row) in named,
            series=series.index(_method(row)),
        )
        for row in results.rows
    )


def _named(results: SweepResults, worth: Callable[[SweepRow], float]) -> tuple[str, ...]:
    """The methods whose points have their share beside them."""
    methods = _series(results)[1:]
    if len(results.points) <= _MOST_NAMED:
        return methods
    return (max(methods, key=lambda method: max(worth(row) for row in results.points if _method(row) == method)),)


def _label(row: SweepRow) -> str:
    """The asked share, because the colour says the method."""
    return f"{100 * row.sparsity:.4g}%" if row.method else "dense"


def _series(results: SweepResults) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_method(row) for row in results.rows))


def _method(row: SweepRow) -> str:
    return (row.method or "dense") + (f", tuned by {row.tuned}" if row.tuned else "")


def _table(results: SweepResults) -> FigureTable:
    heads = tuple(head.replace("\n", " ") for head in columns(results)[1:])
    rows = tuple(Row(row.name, tuple(map(Cell, _figures(results, row)))) for row in results.rows)
    return FigureTable("", heads, (Group("", rows),))


def _figures(results: SweepResults, row: SweepRow) -> tuple[str, ...]:
    """In the order of `columns`."""
    dense = results.dense
    texts = [
        text
        for name, value in row.perplexity.items()
        for text in (formatted(value, "score"), f"{value / dense.perplexity[name]:.3f}")
    ]
    speeds = [f"{row.speed.decode_ratio:.3f}" if row.speed else "-"] if dense.speed else []
    return (
        f"{row.achieved_sparsity:.1%}",
        formatted(row.parameters, "count"),
        f"{row.parameters / dense.parameters:.3f}",
        f"{row.flops_per_token / dense.flops_per_token:.3f}",
        f"{row.held_out:.4f}",
        *texts,
        *speeds,
    )
