from __future__ import annotations

from spinecli.evaluation.results import PerplexityResult


def perplexity_of(scale: float, *, comparable: bool = True) -> PerplexityResult:
    """A perplexity of 30 / scale on a text whose name has to be escaped."""
    return PerplexityResult(
        text="words.txt",
        description="words <1>.txt",
        perplexity=30 / scale,
        nll=3.4,
        scored_tokens=620,
        windows=20,
        window=32,
        stride=32,
        computed_by="loaded model",
        comparable=comparable,
    )
