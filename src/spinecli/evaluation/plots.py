"""comparison.png: quality against size, and speed and memory, as a picture. Needs matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spinecli.artifacts.picture_file import save_figure
from spinecli.evaluation.findings import quality_rows
from spinecli.evaluation.results import ComparisonRow, Evaluation

PICTURE_NAME = "comparison.png"

_PANELS_ACROSS = 3
_MOST_PANELS = 12
_COLOURS = ("#1c1e21", "#2f6fc4", "#c2560c", "#2c8442", "#8f3fb0", "#8a6d00", "#0f7f8c")
_MARKERS = "*osD^vP"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_picture(evaluation: Evaluation, path: Path) -> None:
    """Draw a panel a figure: quality against parameters, speed and memory as bars. What does not fit is in the report.

    Below the panels stands which colour is which model, so that no name covers another.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    labels = [model.label for model in evaluation.models]
    parameters = [model.weights.parameters / 1e6 for model in evaluation.models]
    rows = _drawn(evaluation)
    across = min(len(rows), _PANELS_ACROSS)
    down = -(-len(rows) // across)
    figure = Figure(figsize=(max(4.2 * across, 5.0), 3.4 * down + 0.3 * _lines(labels, across)), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    quality = {row.figure for row in quality_rows(evaluation)}
    for panel, row in zip(panels[: len(rows)], rows, strict=True):
        (_scatter if row.figure in quality else _bars)(panel, parameters, row, labels)
        panel.set_title(row.figure + (", MB" if row.form == "bytes" else ""), fontsize=9)
        if row.form == "share":
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=across, fontsize=8, frameon=False
    )
    save_figure(figure, path)


def _lines(labels: Sequence[str], across: int) -> int:
    """Of the legend."""
    return -(-len(labels) // across)


def _drawn(evaluation: Evaluation) -> list[ComparisonRow]:
    """The measured figures; where nothing was measured that can be drawn, the parameters."""
    # without ratios there is no common unit, and nothing to see side by side
    rows = quality_rows(evaluation)
    rows += [row for row in evaluation.comparison if row.form == "rate" or "memory" in row.figure]
    return rows[:_MOST_PANELS] or [evaluation.comparison[0]]


def _scatter(axis: Any, parameters: Sequence[float], row: ComparisonRow, labels: Sequence[str]) -> None:
    for index, (x, y, label) in enumerate(zip(parameters, row.values, labels, strict=True)):
        if y is not None:
            axis.errorbar(x, y, row.deviations[index] if row.deviations else None, label=label, **_style(index))
    axis.set_xlabel("million parameters")
    axis.margins(0.15)
    axis.grid(alpha=0.3)


def _bars(axis: Any, parameters: Sequence[float], row: ComparisonRow, labels: Sequence[str]) -> None:
    scale = 1e6 if row.form == "bytes" else 1
    for index, (value, label) in enumerate(zip(row.values, labels, strict=True)):
        axis.bar(index, (value or 0) / scale, color=_COLOURS[index % len(_COLOURS)], width=0.6, label=label)
    axis.set_xticks([])
    axis.grid(axis="y", alpha=0.3)


def _style(index: int) -> dict[str, Any]:
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": "none", "markersize": 8, "elinewidth": 1}
