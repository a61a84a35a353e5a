"""report.html of a sweep: how far one can cut, the curve of quality against size, and every point in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spinecli.evaluation.page.page import Cell, Command, FigureTable, Finding, Group, Page, Row, page_html
from spinecli.evaluation.page.plot import Plot, Point
from spinecli.evaluation.report import formatted
from spinecli.evaluation.sweep.report import columns, conditions
from spinecli.evaluation.sweep.results import SweepResults, SweepRow

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
