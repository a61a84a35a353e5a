"""How much faster a model is than the first one of its engine, beside what the shapes promise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from spinecli.benching.results import Run, Speedup, Speedups, Spread
from spinecli.evaluation.results import Rates


def spread(samples: Sequence[float]) -> Spread:
    """Median, minimum and maximum."""
    return Spread(median=median(samples), minimum=min(samples), maximum=max(samples), samples=tuple(samples))


def speedup(own: Rates, reference: Rates, promised: float) -> Speedup:
    """The ratios within each round; what falls on all models of a round alike leaves them unchanged."""
    ratios = [ours / other for ours, other in zip(own.samples, reference.samples, strict=True)]
    return Speedup(measured=spread(ratios), promised=promised)


def compared(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs of one engine with their speed-ups over the first."""
    first, *others = runs
    return (first, *(run.model_copy(update={"speedups": _speedups(run, first)}) for run in others))


def _speedups(run: Run, first: Run) -> Speedups:
    flops = first.work.pass_flops / run.work.pass_flops
    if run.forward is not None and first.forward is not None:
        return Speedups(forward=speedup(run.forward.rows, first.forward.rows, flops))
    if run.latency is None or first.latency is None or run.work.step_bytes is None or first.work.step_bytes is None:
        raise ValueError("the runs of an engine are all of language models or all of classifiers")
    return Speedups(
        prefill=speedup(run.latency.prefill, first.latency.prefill, flops),
        decode=speedup(run.latency.decode, first.latency.decode, first.work.step_bytes / run.work.step_bytes),
    )
