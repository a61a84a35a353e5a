"""report.html of a benchmark: who is how fast in which engine, and every figure."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.evaluation.bench.report import conditions, lines, title
from spinecli.evaluation.bench.results import BenchResults, EngineResult, EngineRun, Speedup
from spinecli.evaluation.page.page import Cell, Command, FigureTable, Finding, Group, Page, Row, page_html
from spinecli.evaluation.page.plot import Plot, Point
from spinecli.evaluation.report import formatted

# Two spaces of a terminal, which a page would drop.
_INDENT = "\u2003"


def bench_html(results: BenchResults, started: str, commands: Sequence[Command] = ()) -> str:
    """The report as one HTML document.

    Args:
        started: the time of the measurement.
        commands: the way to the models and to this benchmark.
    """
    models = [(model.label, model.reference) for model in results.models]
    machine = [(name, str(value)) for name, value in results.machine.items() if value is not None]
    return page_html(
        Page(
            title="Benchmark of " + ", ".join(model.label for model in results.models),
            findings=tuple(_finding(engine) for engine in results.engines),
            plots=tuple(_plot(engine) for engine in results.engines),
            tables=tuple(_table(engine) for engine in results.engines),
            conditions=tuple(conditions(results)),
            commands=tuple(commands),
            facts=(*models, ("measured", started), *machine),
        )
    )


def _finding(engine: EngineResult) -> Finding:
    """Of the engine's last model beside its first."""
    first, run = engine.runs[0], engine.runs[-1]
    doing, speedup = _speedup(run)
    weights = formatted(run.weight_bytes, "bytes")
    if speedup is None:
        rate = formatted(_rate(run), "rate")
        return Finding(f"In {engine.engine}, {run.label}", f"{doing} {rate} tokens a second from {weights} of weights.")
    bound, dense = "bytes" if run.latency else "FLOPs", formatted(first.weight_bytes, "bytes")
    return Finding(
        f"In {engine.engine}, {run.label}",
        f"{doing} {speedup.measured.median:.2f} times as fast as {first.label}, where its {bound} promise "
        f"{speedup.promised:.2f} times. Its weights take {weights} instead of {dense}.",
    )


def _speedup(run: EngineRun) -> tuple[str, Speedup | None]:
    speedups = run.speedups
    if run.latency:
        return "generates", speedups.decode if speedups else None
    return "classifies", speedups.forward if speedups else None


def _rate(run: EngineRun) -> float:
    rates = run.latency.decode if run.latency else run.forward.tokens if run.forward else None
    return rates.median if rates else 0.0


def _plot(engine: EngineResult) -> Plot:
    points = tuple(
        Point(
            name=run.label,
            x=run.weight_bytes / 1e6,
            y=_rate(run),
            said=f"{run.label}: {formatted(_rate(run), 'rate')} tokens/s, {formatted(run.weight_bytes, 'bytes')} of "
            f"weights as {run.precision}",
            value=f"{formatted(_rate(run), 'rate')}/s",
            series=0 if run is engine.runs[0] else 1,
        )
        for run in engine.runs
    )
    measure = "decode" if engine.runs[0].latency else "forward"
    return Plot(
        title=f"Weights and speed in {title(engine)}",
        x_title="MB of weights",
        y_title=f"{measure}, tokens/s, higher is better",
        points=points,
    )


def _table(engine: EngineResult) -> FigureTable:
    rows = tuple(Row(name.replace("  ", _INDENT, 1), tuple(map(Cell, cells))) for name, *cells in lines(engine))
    return FigureTable(title(engine), tuple(run.label for run in engine.runs), (Group("", rows),))
