from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.evaluation.bench import llama_cpp_engine
from spinecli.evaluation.bench.cost import compared, speedup, spread
from spinecli.evaluation.bench.llama_cpp_engine import time_llama_cpp
from spinecli.evaluation.bench.results import EngineRun, PromisedWork
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.latency import Seconds, generation_rates, rates
from spinecli.evaluation.results import ForwardResult, LatencyResult, MemoryResult

SETTINGS = GenerationConfig(prompt_length=6, new_tokens=4, batch_size=2, repeats=3, warmup=1)
MEMORY = MemoryResult(peak_bytes=3, before_loading_bytes=1, added_bytes=2, device_peak_bytes=None)


def _run(latency: LatencyResult | None, work: PromisedWork, forward: ForwardResult | None = None) -> EngineRun:
    return EngineRun(
        label="model",
        precision="float32",
        weight_bytes=1,
        memory=MEMORY,
        work=work,
        pass_seconds=spread([1.0]),
        latency=latency,
        forward=forward,
    )


def _taking(prefill: list[float], decode: list[float]) -> Callable[[], Seconds]:
    taken: Iterator[Seconds] = iter([Seconds(*each) for each in zip(prefill, decode, strict=True)])
    return lambda: next(taken)


def test_ratios_are_medians_of_the_rounds_and_the_first_round_does_not_count() -> None:
    dense = _taking([99, 2, 4, 8], [99, 10, 20, 40])
    # twice as fast but for the last round, in which something else ran
    cut = _taking([1, 1, 2, 8], [1, 4, 8, 80])
    results = generation_rates([dense, cut], batch=2, length=6, config=SETTINGS)
    assert results[0].prefill.samples == (6.0, 3.0, 1.5)
    assert results[0].decode.samples == (0.6, 0.3, 0.15)
    works = [PromisedWork(pass_flops=30, step_bytes=10), PromisedWork(pass_flops=20, step_bytes=8)]
    first, second = compared([_run(found, work) for found, work in zip(results, works, strict=True)])
    assert first.speedups is None
    assert second.speedups is not None
    prefill, decode = second.speedups.prefill, second.speedups.decode
    assert prefill is not None
    assert decode is not None
    assert prefill.measured.samples == (2.0, 2.0, 1.0)
    assert (prefill.measured.median, prefill.measured.minimum, prefill.measured.maximum) == (2.0, 1.0, 2.0)
    assert decode.measured.samples == pytest.approx((2.5, 2.5, 0.5))
    assert (prefill.promised, decode.promised) == (1.5, 1.25)
    assert second.speedups.forward is None


def test_a_classifier_has_one_speedup() -> None:
    slow, fast = (ForwardResult(rows=rates([rate]), tokens=rates([5 * rate])) for rate in (2.0, 3.0))
    _, second = compared(
        [
            _run(None, PromisedWork(pass_flops=4, step_bytes=None), slow),
            _run(None, PromisedWork(pass_flops=2, step_bytes=None), fast),
        ]
    )
    assert second.speedups is not None
    assert second.speedups.forward is not None
    assert (second.speedups.forward.measured.median, second.speedups.forward.promised) == (1.5, 2.0)
    assert (second.speedups.prefill, second.speedups.decode) == (None, None)


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=9), st.floats(0.1, 10))
def test_noise_that_falls_on_a_whole_round_leaves_no_spread(noise: list[float], factor: float) -> None:
    found = speedup(rates([factor * rate for rate in noise]), rates(noise), promised=2.0).measured
    assert found.minimum == pytest.approx(factor)
    assert found.maximum == pytest.approx(factor)


class _Counted:
    """A model of llama.cpp that writes down its calls."""

    length = 6

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def forget(self) -> None:
        self.calls.append(("forget",))

    def prefill(self, prompt: list[list[int]]) -> list[int]:
        self.calls.append(("prefill", len(prompt), len(prompt[0])))
        return [7 for _ in prompt]

    def step(self, tokens: list[int], position: int) -> list[int]:
        self.calls.append(("step", tokens, position))
        return [token + 1 for token in tokens]


def test_the_clock_of_llama_cpp_splits_at_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    model: Any = _Counted()
    clock = type("Clock", (), {"perf_counter": staticmethod(lambda: 10 * next(ticks) + len(model.calls))})
    monkeypatch.setattr(llama_cpp_engine, "time", clock)
    found = time_llama_cpp(model, [[0] * 6] * 2, new_tokens=4)
    assert model.calls == [
        ("forget",),
        ("prefill", 2, 6),
        ("step", [7, 7], 6),
        ("step", [8, 8], 7),
        ("step", [9, 9], 8),
    ]
    # the cache is emptied before the clock starts: one call in the first part, three in the second
    assert found == Seconds(prefill=11, decode=13)
