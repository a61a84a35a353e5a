"""comparison.png: the trade-off at a glance. Needs matplotlib, which is optional."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spinecli.evaluation.results import ComparisonRow, Evaluation

PICTURE_NAME = "comparison.png"

_PANELS_ACROSS = 3
_MOST_PANELS = 12


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_picture(evaluation: Evaluation, path: Path) -> None:
    """Draw a panel a figure: perplexity against parameters, the others as bars. What does not fit is in the report."""
    from matplotlib.figure import Figure

    labels = [model.label for model in evaluation.models]
    parameters = [model.weights.parameters / 1e6 for model in evaluation.models]
    rows = _drawn(evaluation)
    across = min(len(rows), _PANELS_ACROSS)
    down = -(-len(rows) // across)
    figure = Figure(figsize=(4.2 * across, 3.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, row in zip(panels[: len(rows)], rows, strict=True):
        if row.figure.startswith("perplexity"):
            _scatter(panel, parameters, row, labels)
        else:
            _bars(panel, row, labels)
        panel.set_title(row.figure + (", MB" if row.form == "bytes" else ""), fontsize=9)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=144)


def _drawn(evaluation: Evaluation) -> list[ComparisonRow]:
    """The measured figures; where nothing was measured that can be drawn, the parameters."""
    perplexities = [row for row in evaluation.comparison if row.figure.startswith("perplexity")]
    # without ratios there is no common unit, and nothing to see side by side
    rows = [row for row in perplexities if None not in row.ratios]
    rows += [row for row in evaluation.comparison if row.form in ("score", "rate") and row not in perplexities]
    rows += [row for row in evaluation.comparison if "memory" in row.figure]
    return rows[:_MOST_PANELS] or [evaluation.comparison[0]]


def _scatter(axis: Any, parameters: list[float], row: ComparisonRow, labels: list[str]) -> None:
    axis.plot(parameters, row.values, "o", color="#4472c4")
    for x, y, label in zip(parameters, row.values, labels, strict=True):
        axis.annotate(label, (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axis.set_xlabel("million parameters")
    axis.margins(0.25)
    axis.grid(alpha=0.3)


def _bars(axis: Any, row: ComparisonRow, labels: list[str]) -> None:
    values = [value or 0 for value in row.values]
    scale = 1e6 if row.form == "bytes" else 1
    errors = [deviation or 0 for deviation in row.deviations] or None
    axis.bar(range(len(labels)), [value / scale for value in values], yerr=errors, color="#4472c4", width=0.6)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
