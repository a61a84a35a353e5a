"""A sweep in words, and the curve of quality against size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinecli.artifacts.picture_file import save_figure
from spinecli.evaluation.report import windows_in_words
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
    sentences += [f"{refusal.name} is left out: {refusal.reason}" for refusal in results.refused]
    return sentences


def _tunings(points: Sequence[SweepRow]) -> str:
    found = dict.fromkeys((row.method, row.tuned) for row in points if row.tuned)
    return ", ".join(f"{method} by {tuned}" for method, tuned in found)
