from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spinecli.errors import OptionError
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.latency import measure_latency, paired_ratio, random_prompt, rates
from spinecli.evaluation.lengths import fit_generation

SETTINGS = GenerationConfig(prompt_length=6, new_tokens=4, batch_size=2, repeats=3, warmup=1)


class _Recorded(nn.Module):
    """Answers with constant logits and writes down who was called with how many tokens."""

    def __init__(self, name: str, calls: list[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        assert use_cache
        self.calls.append((self.name, input_ids.shape[1], past_key_values is not None))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5), past_key_values=object())


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9))
def test_rates_are_ordered(samples: list[float]) -> None:
    found = rates(samples)
    assert found.minimum <= found.median <= found.maximum
    assert found.samples == tuple(samples)
    assert sum(sample < found.median for sample in samples) <= len(samples) / 2


def test_median_of_an_odd_and_an_even_number() -> None:
    assert rates([3.0, 1.0, 2.0]).median == 2.0
    assert rates([4.0, 1.0, 2.0, 3.0]).median == 2.5


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=9), st.floats(0.1, 10))
def test_noise_that_falls_on_both_models_leaves_the_ratio(noise: list[float], factor: float) -> None:
    assert paired_ratio(rates([factor * rate for rate in noise]), rates(noise)) == pytest.approx(factor)


def test_models_take_turns_and_use_their_cache() -> None:
    calls: list[tuple[str, int, bool]] = []
    models = [_Recorded("a", calls), _Recorded("b", calls)]
    prompt = random_prompt(5, 6, 2)
    results = measure_latency(models, [prompt, prompt], SETTINGS)
    generation = [(6, False), (1, True), (1, True), (1, True)]
    turn = [(name, length, cached) for name in "ab" for length, cached in generation]
    assert calls == turn * (SETTINGS.warmup + SETTINGS.repeats)
    assert [len(result.decode.samples) for result in results] == [3, 3]


def test_the_prompt_is_always_the_same() -> None:
    assert torch.equal(random_prompt(50, 6, 2), random_prompt(50, 6, 2))
    assert random_prompt(50, 6, 2).shape == (2, 6)
    assert random_prompt(50, 6, 2, (7, 8))[:, :2].tolist() == [[7, 8]] * 2
    assert random_prompt(50, 1, 1, (7, 8)).tolist() == [[7]]


def test_a_generation_longer_than_the_model_is_refused() -> None:
    notes: list[str] = []
    assert fit_generation(SETTINGS, {"unlimited": None, "just enough": 10}, notes.append) == SETTINGS
    with pytest.raises(OptionError, match=r"6 and 4 new tokens exceed the 9 positions of small; lower --prompt-length"):
        fit_generation(SETTINGS, {"small": 9}, notes.append)
    assert notes == []


def test_a_generation_that_decodes_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="--new-tokens must be at least 2, not 1"):
        fit_generation(GenerationConfig(new_tokens=1), {}, pytest.fail)


def test_a_prompt_that_nobody_asked_for_fits_the_shortest_model() -> None:
    notes: list[str] = []
    free = GenerationConfig(new_tokens=32)
    assert fit_generation(free, {"long": 4096}, notes.append).prompt_length == 128
    assert fit_generation(free, {"long": 4096, "short": 96}, notes.append).prompt_length == 64
    assert notes == ["The prompt has 64 tokens instead of 128, because short has 96 positions."]
    with pytest.raises(OptionError, match="--new-tokens"):
        fit_generation(free, {"tiny": 32}, notes.append)
