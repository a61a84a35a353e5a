"""The table of a sweep and how its figures were taken, in words."""

from __future__ import annotations

from collections.abc import Sequence

from spinecli.evaluation.wording import windows_in_words
from spinecli.sweeping.results import Row, SweepResults


def columns(results: SweepResults) -> tuple[str, ...]:
    """Heads of the table."""
    several = len(results.texts) > 1
    heads = [f"perplexity,\n{text.description}" if several else "perplexity" for text in results.texts.values()]
    texts = [part for head in heads for part in (head, "×")]
    speeds = ["decode,\n×"] if results.dense.speed else []
    return ("", "removed", "parameters", "×", "FLOPs,\n×", "held-out", *texts, *speeds)


def conditions(results: SweepResults) -> list[str]:
    """How the figures were taken, one sentence each; without this they mean nothing."""
    sentences = ["Removed is the share of block parameters. Ratios are to the dense model."]
    sentences.append(f"Held-out: {results.held_out_by}, on calibration rows that recovery is not fitted to.")
    for text in results.texts.values():
        cut = windows_in_words(text.windows, text.window, text.stride, text.opened_by)
        sentences.append(f"Perplexity on {text.description}: {cut}.")
    if results.generation and results.machine:
        generation = results.generation
        sentences.append(
            f"Speed: {generation.prompt_length} + {generation.new_tokens} tokens, batch {generation.batch_size}, on "
            f"{results.machine['device']}, threads: {results.machine['threads']}; median of {generation.repeats} "
            "rounds, each model and the dense one in turns."
        )
    if tunings := _tunings(results.points):
        sentences.append(f"Tuned after the cut: {tunings}.")
    sentences += [f"{refusal.name} is left out: {refusal.reason}" for refusal in results.refused]
    return sentences


def _tunings(points: Sequence[Row]) -> str:
    found = dict.fromkeys((row.method, row.tuned) for row in points if row.tuned)
    return ", ".join(f"{method} by {tuned}" for method, tuned in found)
