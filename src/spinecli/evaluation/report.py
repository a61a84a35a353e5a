"""Figures and their conditions in words, the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spinecli.evaluation.results import ComparisonRow, Evaluation, Form


def cell(row: ComparisonRow, index: int) -> str:
    """The value of model `index` as a person reads it."""
    value = row.values[index]
    if value is None:
        return "-"
    text = formatted(value, row.form)
    deviation = row.deviations[index] if row.deviations else None
    return f"{text} ± {formatted(deviation, row.form)}" if deviation is not None else text


def ratio_cell(row: ComparisonRow, index: int) -> str:
    """The ratio of model `index` to the first one."""
    ratio = row.ratios[index]
    return "-" if ratio is None else f"{ratio:.3f}"


def comparison_lines(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """A head and a line a figure; beside every model but the first, its ratio to the first one."""
    head = [""]
    lines = [[row.figure] for row in evaluation.comparison]
    for index, model in enumerate(evaluation.models):
        head += [model.label] if index == 0 else [model.label, "×"]
        for line, row in zip(lines, evaluation.comparison, strict=True):
            line += [cell(row, index)] if index == 0 else [cell(row, index), ratio_cell(row, index)]
    return head, lines


def conditions(evaluation: Evaluation) -> list[str]:
    """How the figures were taken, one sentence a measure; without this they mean nothing."""
    models, generation = evaluation.models, evaluation.generation
    sentences = []
    if len(models) > 1:
        sentences.append(f"Ratios are to {models[0].label}.")
    texts = [text for model in models for text in model.perplexity]
    for cut in dict.fromkeys((text.windows, text.window, text.stride, text.opened_by) for text in texts):
        sentences.append(f"Perplexity: {windows_in_words(*cut)}.")
    if not all(text.comparable for model in models for text in model.perplexity):
        sentences.append("Perplexities of models with different tokenizers do not compare.")
    if evaluation.ran_tasks:
        sentences.append(f"Tasks: lm-eval {evaluation.lm_eval_version}, ± one standard error.")
    sentences += _examples(evaluation)
    if any(model.latency or model.forward or model.memory for model in models):
        work = (
            f"Generation: {generation.prompt_length} + {generation.new_tokens} tokens"
            if generation.new_tokens
            else f"Forward pass: rows of {generation.prompt_length} tokens"
        )
        sentences.append(
            f"{work}, batch {generation.batch_size}, {evaluation.settings.dtype} on {evaluation.settings.device}, "
            f"threads: {evaluation.machine['threads']}."
        )
    if any(model.latency or model.forward for model in models):
        turns = ", the models in turns" if len(models) > 1 else ""
        sentences.append(f"Speed: median of {generation.repeats} rounds{turns}.")
    if any(model.memory for model in models):
        use = "generates" if generation.new_tokens else "runs one forward pass"
        sentences.append(f"Memory: peak of a fresh process that loads the model and {use}.")
    return sentences


def windows_in_words(windows: int, window: int, stride: int, opened_by: str) -> str:
    """How a text was cut; `opened_by` are the special tokens in front of every window."""
    opening = f"each opened by {opened_by}, which is not scored" if opened_by else "no special tokens"
    return f"{windows} windows of {window} tokens, stride {stride}, {opening}"


def _examples(evaluation: Evaluation) -> list[str]:
    """How the labelled examples were answered."""
    results = [model.classification for model in evaluation.models if model.classification is not None]
    if not results:
        return []
    sentences = [
        f"Labelled examples: {results[0].examples}, at most {results[0].max_length} tokens each; "
        "accuracy ± one standard error, loss in nats."
    ]
    labels = [
        model.label
        for model in evaluation.models
        if model.classification is not None and model.classification.matched_by == "position"
    ]
    if labels:
        sentences.append(f"Labels were matched by position for {', '.join(labels)}.")
    return sentences


def formatted(value: float, form: Form) -> str:
    """A figure as a person reads it."""
    return _FORMATS[form](value)


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
    "share": lambda value: f"{value:.1%}",
}
