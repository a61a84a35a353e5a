"""Figures and their conditions in words, the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spinecli.evaluation.results import Evaluation, Form, Row


def cell(row: Row, index: int) -> str:
    """The value of model `index` as a person reads it."""
    value = row.values[index]
    if value is None:
        return "-"
    text = _FORMATS[row.form](value)
    deviation = row.deviations[index] if row.deviations else None
    return f"{text} ± {_FORMATS[row.form](deviation)}" if deviation is not None else text


def ratio_cell(row: Row, index: int) -> str:
    """The ratio of model `index` to the first one."""
    ratio = row.ratios[index]
    return "-" if ratio is None else f"{ratio:.3f}"


def conditions(evaluation: Evaluation) -> list[str]:
    """How the figures were taken, one sentence a measure; without this they mean nothing."""
    models, generation = evaluation.models, evaluation.generation
    sentences = []
    if len(models) > 1:
        sentences.append(f"Ratios are to {models[0].label}.")
    for cut in dict.fromkeys((text.windows, text.window, text.stride) for text in models[0].perplexity):
        windows, window, stride = cut
        sentences.append(f"Perplexity: {windows} windows of {window} tokens, stride {stride}, no special tokens.")
    if not all(text.comparable for model in models for text in model.perplexity):
        sentences.append("Perplexities of models with different tokenizers do not compare.")
    if evaluation.ran_tasks:
        sentences.append(f"Tasks: lm-eval {evaluation.lm_eval_version}, ± one standard error.")
    if any(model.latency or model.memory for model in models):
        sentences.append(
            f"Generation: {generation.prompt_length} + {generation.new_tokens} tokens, batch {generation.batch_size}, "
            f"{evaluation.settings.dtype} on {evaluation.settings.device}, threads: {evaluation.machine['threads']}."
        )
    if any(model.latency for model in models):
        turns = ", the models in turns" if len(models) > 1 else ""
        sentences.append(f"Speed: median of {generation.repeats} rounds{turns}.")
    if any(model.memory for model in models):
        sentences.append("Memory: peak of a fresh process that loads the model and generates.")
    return sentences


def _scaled(value: float, step: float, units: Sequence[str]) -> str:
    for unit in units:
        if abs(value) < step or unit == units[-1]:
            return f"{value:.0f}{unit}" if unit == units[0] else f"{value:.2f}{unit}"
        value /= step
    raise AssertionError


def _significant(value: float) -> str:
    """Four significant digits, never in exponents below a million."""
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"


_FORMATS: dict[Form, Callable[[float], str]] = {
    "count": lambda value: _scaled(value, 1000, ("", "k", "M", "G", "T")),
    "bytes": lambda value: _scaled(value, 1000, (" B", " kB", " MB", " GB")),
    "rate": _significant,
    "score": _significant,
}
