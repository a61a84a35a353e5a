"""What a comparison comes to in sentences: what was cut, what it costs in quality, what it gives in speed and bytes."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.checkpoints.cut_picture import BlockCut
from spinecli.evaluation.page.page import Finding
from spinecli.evaluation.report import formatted
from spinecli.evaluation.results import ComparisonRow, Evaluation

# Of speeds, whose measurements scatter, and of sizes.
_ABOUT_EQUAL = 0.02
_EQUAL = 0.0005


def findings(evaluation: Evaluation) -> tuple[Finding, ...]:
    """A finding for every model but the first, that of the model under evaluation before the others'."""
    labels = [model.label for model in evaluation.models]
    if len(labels) == 1:
        return (Finding(labels[0], _alone(evaluation)),)
    order = [len(labels) - 1, *range(1, len(labels) - 1)]
    return tuple(Finding(labels[index], _beside_first(evaluation, index)) for index in order)


def cut_in_words(cut: Sequence[BlockCut]) -> str:
    """What is left of a model, in figures: `8 of 10 blocks, 60 of 80 heads and 2,240 of 3,840 channels`."""
    kept = sum(not block.removed for block in cut)
    counts = [
        (kept, len(cut), "blocks"),
        (sum(block.heads for block in cut), sum(block.of_heads for block in cut), "heads"),
        (sum(block.channels for block in cut), sum(block.of_channels for block in cut), "channels"),
    ]
    *first, last = [f"{left:,} of {had:,} {name}" for left, had, name in counts if left < had] or ["everything"]
    return f"{', '.join(first)} and {last}" if first else last


def change_in_words(row: ComparisonRow, index: int) -> str:
    """How a figure moved from the first model to this one: `rises from 4.60 to 5.71 (+24.1%)`."""
    first, value, ratio = row.values[0], row.values[index], row.ratios[index]
    if first is None or value is None:
        return ""
    verb = "stays at" if formatted(value, row.form) == formatted(first, row.form) else "goes"
    if verb == "stays at":
        return f"stays at {formatted(value, row.form)}"
    verb = "rises" if value > first else "falls"
    change = f" ({ratio - 1:+.1%})" if ratio is not None and row.form != "share" else ""
    return f"{verb} from {formatted(first, row.form)} to {formatted(value, row.form)}{change}"


def faster_in_words(ratio: float, doing: str) -> str:
    """A ratio of speeds: `generates 1.64 times as fast`."""
    return f"{doing} as fast" if abs(ratio - 1) < _ABOUT_EQUAL else f"{doing} {ratio:.2f} times as fast"


def quality_rows(evaluation: Evaluation) -> list[ComparisonRow]:
    """The figures that say how good a model is and compare between models, the one to look at first before the others.

    A classifier's accuracy counts before its loss; of a task one metric does.
    """
    rows = [row for row in evaluation.comparison if row.better != "neither" and is_quality(row)]
    return [row for row in rows if None not in row.ratios or len(row.values) == 1]


def is_quality(row: ComparisonRow) -> bool:
    """Whether a figure is about answers, and not about size, speed or memory."""
    return row.form in ("score", "share")


def _beside_first(evaluation: Evaluation, index: int) -> str:
    first, model = evaluation.models[0], evaluation.models[index]
    rows = {row.figure: row for row in evaluation.comparison}
    sentences = [_cut(evaluation, index)]
    if quality := quality_rows(evaluation):
        sentences.append(f"{_subject(quality[0])} {change_in_words(quality[0], index)}.")
    gains = []
    for figure, doing in (("decode, tokens/s", "generates"), ("forward, rows/s", "classifies")):
        if figure in rows and (ratio := rows[figure].ratios[index]) is not None:
            gains.append(faster_in_words(ratio, f"It {doing}"))
    own, other = model.weights.bytes_on_disk, first.weights.bytes_on_disk
    taken = "takes" if gains else "It takes"
    if abs(own / max(other, 1) - 1) < _EQUAL:
        gains.append(f"{taken} as many bytes on disk, {formatted(own, 'bytes')}")
    else:
        gains.append(f"{taken} {formatted(own, 'bytes')} on disk instead of {formatted(other, 'bytes')}")
    sentences.append(" and ".join(gains) + ".")
    return " ".join(sentence for sentence in sentences if sentence)


def _cut(evaluation: Evaluation, index: int) -> str:
    """What was cut, as far as the checkpoint says, and the share of the first model's parameters that is left."""
    first, model = evaluation.models[0], evaluation.models[index]
    ratio = model.weights.block_parameters / max(first.weights.block_parameters, 1)
    if abs(ratio - 1) < _EQUAL:
        share = f"as many block parameters as {first.label}"
    elif ratio < 1:
        share = f"{1 - ratio:.1%} fewer block parameters than {first.label}"
    else:
        share = f"{ratio - 1:.1%} more block parameters than {first.label}"
    kept = f": it keeps {cut_in_words(model.cut)}" if model.cut and ratio < 1 - _EQUAL else ""
    return f"has {share}{kept}."


def _alone(evaluation: Evaluation) -> str:
    [model] = evaluation.models
    weights = model.weights
    size = f"{formatted(weights.parameters, 'count')} parameters in {formatted(weights.bytes_on_disk, 'bytes')}"
    sentences = [f"has {size}."]
    if quality := quality_rows(evaluation):
        value = quality[0].values[0]
        sentences.append(f"{_subject(quality[0])} is {formatted(value or 0.0, quality[0].form)}.")
    if model.latency:
        sentences.append(f"It generates {formatted(model.latency.decode.median, 'rate')} tokens a second.")
    if model.forward:
        sentences.append(f"It classifies {formatted(model.forward.rows.median, 'rate')} rows a second.")
    return " ".join(sentences)


def _subject(row: ComparisonRow) -> str:
    """The figure as a sentence begins with it; a task keeps its name."""
    name, _, text = row.figure.partition(", ")
    return f"{name[0].upper()}{name[1:]} on {text}" if text else f"Its {name}"
