"""A benchmark in words: the lines of an engine's table, and how the figures were taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spinecli.evaluation.bench.results import BenchResults, EngineResult, EngineRun, Speedup, Spread
from spinecli.evaluation.page.page import Cell, Command, FigureTable, Finding, Group, Page, Row, page_html
from spinecli.evaluation.page.plot import Plot, Point
from spinecli.evaluation.report import formatted

_ABSENT = "-"


def lines(engine: EngineResult) -> list[tuple[str, ...]]:
    """Rows of the table: the figure's name, and its value of every model."""
    runs = engine.runs
    found = [
        _row("weights as", runs, lambda run: run.precision),
        _row("weights", runs, lambda run: _bytes(run.weight_bytes)),
        _row("peak memory", runs, lambda run: _bytes(run.memory.peak_bytes)),
        _row("  of this, for the model", runs, lambda run: _bytes(run.memory.added_bytes)),
    ]
    if any(run.memory.device_peak_bytes for run in runs):
        found.append(_row("peak memory on device", runs, lambda run: _bytes(run.memory.device_peak_bytes)))
    if runs[0].forward:
        found += [
            _row("time of a batch, ms", runs, lambda run: _milliseconds(run.pass_seconds)),
            _row("forward, tokens/s", runs, lambda run: _rate(run.forward.tokens.median if run.forward else None)),
            *_compared(runs, "FLOPs", lambda run: run.speedups.forward if run.speedups else None),
        ]
        return found
    return [
        *found,
        _row("time to first token, ms", runs, lambda run: _milliseconds(run.pass_seconds)),
        _row("prefill, tokens/s", runs, lambda run: _rate(run.latency.prefill.median if run.latency else None)),
        *_compared(runs, "FLOPs", lambda run: run.speedups.prefill if run.speedups else None),
        _row("decode, tokens/s", runs, lambda run: _rate(run.latency.decode.median if run.latency else None)),
        *_compared(runs, "bytes", lambda run: run.speedups.decode if run.speedups else None),
    ]


def title(engine: EngineResult) -> str:
    """The engine and its version."""
    return f"{engine.engine} ({engine.version})"


def conditions(results: BenchResults) -> list[str]:
    """How the figures were taken, one sentence a measure; without this they mean nothing."""
    settings, generation = results.settings, results.settings.generation
    classifies = generation.new_tokens == 0
    work = (
        f"One pass: rows of {generation.prompt_length} tokens"
        if classifies
        else f"Generation: {generation.prompt_length} + {generation.new_tokens} tokens"
    )
    places = [f"torch on {settings.device}", "llama.cpp on cpu"]
    used = [place for place in places if place.split()[0] in {engine.engine for engine in results.engines}]
    several = any(len(engine.runs) > 1 for engine in results.engines)
    sentences = [
        f"{work}, batch {generation.batch_size}; {', '.join(used)}; threads: {results.machine['threads']}.",
        f"Speed: median of {generation.repeats} rounds{', the models in turns' if several else ''}.",
        f"Memory: peak of a fresh process that loads the model and {'runs one pass' if classifies else 'generates'}.",
    ]
    if several:
        promised = "FLOPs" if classifies else "FLOPs of the prefill, bytes read by a decode step"
        sentences.append(
            "×: speed divided by the first column's in the same round, median (lowest to highest); "
            f"below it, what the shapes promise ({promised})."
        )
    return sentences


def _row(name: str, runs: Sequence[EngineRun], value: Callable[[EngineRun], str]) -> tuple[str, ...]:
    return (name, *(value(run) for run in runs))


def _compared(
    runs: Sequence[EngineRun], bound: str, speedup_of: Callable[[EngineRun], Speedup | None]
) -> list[tuple[str, ...]]:
    if len(runs) < 2:
        return []
    found = [speedup_of(run) for run in runs]
    return [
        ("  ×, measured", *(_measured(each.measured) if each else _ABSENT for each in found)),
        (f"  ×, promised by {bound}", *(f"{each.promised:.2f}" if each else _ABSENT for each in found)),
    ]


def _measured(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.minimum:.2f} to {ratio.maximum:.2f})"


def _milliseconds(seconds: Spread) -> str:
    return f"{1000 * seconds.median:.4g}"


def _rate(value: float | None) -> str:
    return _ABSENT if value is None else formatted(value, "rate")


def _bytes(count: int | None) -> str:
    return _ABSENT if count is None else formatted(count, "bytes")


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
        rate = formatted(_speed_figure(run), "rate")
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


def _speed_figure(run: EngineRun) -> float:
    rates = run.latency.decode if run.latency else run.forward.tokens if run.forward else None
    return rates.median if rates else 0.0


def _plot(engine: EngineResult) -> Plot:
    points = tuple(
        Point(
            name=run.label,
            x=run.weight_bytes / 1e6,
            y=_speed_figure(run),
            said=f"{run.label}: {formatted(_speed_figure(run), 'rate')} tokens/s, "
            f"{formatted(run.weight_bytes, 'bytes')} of weights as {run.precision}",
            value=f"{formatted(_speed_figure(run), 'rate')}/s",
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
