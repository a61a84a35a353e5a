"""From what was measured of each model to one row a figure, with ratios to the first model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spinecli.evaluation.latency import paired_ratio
from spinecli.evaluation.results import Better, ComparisonRow, Form, ModelResult, Rates, Weights
from spinecli.evaluation.tasks import TaskFigure, task_figures

# Metrics of lm-eval that are shares of the examples.
_SHARES = ("acc", "acc_norm", "exact_match")


def compare(models: Sequence[ModelResult]) -> tuple[ComparisonRow, ...]:
    """All figures that at least one model has, in the order of the table."""
    rows = [
        *_weights(models),
        *_perplexities(models),
        *_tasks(models),
        *_classification(models),
        *_speeds(models),
        *_passes(models),
        *_memories(models),
    ]
    return tuple(row for row in rows if any(value is not None for value in row.values))


def _ratios(values: Sequence[float | None]) -> tuple[float | None, ...]:
    first = values[0]
    return tuple(value / first if value is not None and first else None for value in values)


def _row(figure: str, better: Better, form: Form, values: Sequence[float | None]) -> ComparisonRow:
    return ComparisonRow(figure=figure, better=better, form=form, values=tuple(values), ratios=_ratios(values))


def _weights(models: Sequence[ModelResult]) -> list[ComparisonRow]:
    def values(get: Callable[[Weights], int]) -> list[float | None]:
        return [float(get(model.weights)) for model in models]

    rows = [
        _row("parameters", "lower", "count", values(lambda weights: weights.parameters)),
        _row("block parameters", "lower", "count", values(lambda weights: weights.block_parameters)),
        _row("bytes on disk", "lower", "bytes", values(lambda weights: weights.bytes_on_disk)),
        _row("FLOPs per token", "lower", "count", values(lambda weights: weights.flops_per_token)),
    ]
    if any(model.adapter for model in models):
        adapters = [float(model.weights.adapter_parameters) if model.adapter else None for model in models]
        rows.insert(2, _row("adapter parameters", "lower", "count", adapters))
    return rows


def _perplexities(models: Sequence[ModelResult]) -> list[ComparisonRow]:
    rows = []
    for index, first in enumerate(models[0].perplexity):
        results = [model.perplexity[index] for model in models]
        values = [result.perplexity for result in results]
        # perplexity is per token, so two ways to cut a text into tokens have none in common
        ratios = [
            value / first.perplexity if result.comparable else None
            for value, result in zip(values, results, strict=True)
        ]
        rows.append(
            ComparisonRow(
                figure=f"perplexity, {first.description}",
                better="lower",
                form="score",
                values=tuple(values),
                ratios=tuple(ratios),
            )
        )
    return rows


def _tasks(models: Sequence[ModelResult]) -> list[ComparisonRow]:
    by_model: list[dict[tuple[str, str], TaskFigure]] = [
        {(figure.task, figure.metric): figure for figure in task_figures(model.lm_eval)} if model.lm_eval else {}
        for model in models
    ]
    rows = []
    for task, metric in by_model[0]:
        figures = [found.get((task, metric)) for found in by_model]
        values = [figure.value if figure else None for figure in figures]
        higher = next((figure.higher_is_better for figure in figures if figure), None)
        rows.append(
            ComparisonRow(
                figure=f"{task} {metric}",
                better="neither" if higher is None else "higher" if higher else "lower",
                form="share" if metric in _SHARES else "score",
                values=tuple(values),
                deviations=tuple(figure.deviation if figure else None for figure in figures),
                ratios=_ratios(values),
            )
        )
    return rows


def _classification(models: Sequence[ModelResult]) -> list[ComparisonRow]:
    results = [model.classification for model in models if model.classification is not None]
    if not results:
        return []
    data = results[0].description
    accuracy = _row(f"accuracy, {data}", "higher", "share", [result.accuracy for result in results])
    errors = tuple(result.accuracy_error for result in results)
    return [
        accuracy.model_copy(update={"deviations": errors}),
        _row(f"macro F1, {data}", "higher", "share", [result.macro_f1 for result in results]),
        _row(f"loss, {data}", "lower", "score", [result.nll for result in results]),
    ]


def _speeds(models: Sequence[ModelResult]) -> list[ComparisonRow]:
    latencies = [model.latency for model in models if model.latency is not None]
    if not latencies:
        return []
    return [
        _speed("prefill, tokens/s", [latency.prefill for latency in latencies]),
        _speed("decode, tokens/s", [latency.decode for latency in latencies]),
    ]


def _passes(models: Sequence[ModelResult]) -> list[ComparisonRow]:
    passes = [model.forward for model in models if model.forward is not None]
    if not passes:
        return []
    return [
        _speed("forward, rows/s", [each.rows for each in passes]),
        _speed("forward, tokens/s", [each.tokens for each in passes]),
    ]


def _speed(figure: str, measured: Sequence[Rates]) -> ComparisonRow:
    return ComparisonRow(
        figure=figure,
        better="higher",
        form="rate",
        values=tuple(each.median for each in measured),
        ratios=tuple(paired_ratio(each, measured[0]) for each in measured),
    )


def _memories(models: Sequence[ModelResult]) -> list[ComparisonRow]:
    memories = [model.memory for model in models]
    peaks = [float(memory.peak_bytes) if memory else None for memory in memories]
    added = [float(memory.added_bytes) if memory else None for memory in memories]
    device = [float(memory.device_peak_bytes) if memory and memory.device_peak_bytes else None for memory in memories]
    return [
        _row("peak memory", "lower", "bytes", peaks),
        _row("of this, for the model", "lower", "bytes", added),
        _row("peak memory on device", "lower", "bytes", device),
    ]
