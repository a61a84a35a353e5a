"""Every sum against an explicit one over the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spinecli.pruning.method as method
import spinecli.pruning.recovery.moments as moments_module
from spinecli.pruning.method import add_gram
from spinecli.pruning.recovery.moments import Moments

K, OUT = 6, 4
FIELDS = ("weight", "gram", "cross", "inputs", "targets", "square")


def drawn(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (tokens, k), targets (tokens, d) and weights (tokens,) of very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return draw(tokens, K) + 0.5, draw(tokens, OUT) - 0.3, draw(tokens).exp()


def summed(inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Moments:
    found = Moments.none(inputs.shape[1], targets.shape[1])
    found.observe(inputs, targets, weights)
    return found


def layer(seed: int, *, biased: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, K, generator=generator, dtype=torch.float64)
    return weight, torch.randn(OUT, generator=generator, dtype=torch.float64) if biased else None


def assert_same(one: Moments, other: Moments, *, but: tuple[str, ...] = ()) -> None:
    for name in set(FIELDS) - set(but):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), msg=lambda said, name=name: name + said)


@given(seed=st.integers(0, 999), tokens=st.integers(0, 40), chunk=st.integers(1, 15), data=st.data())
def test_they_are_the_weighted_sums_in_any_chunks(seed: int, tokens: int, chunk: int, data: st.DataObject) -> None:
    inputs, targets, weights = drawn(seed, tokens)
    found = Moments.none(K, OUT)
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(moments_module, "GRAM_CHUNK", chunk)
        for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
            found.observe(inputs[start:stop], targets[start:stop], weights[start:stop])
    spread = inputs * weights[:, None]
    torch.testing.assert_close(found.weight, weights.sum())
    torch.testing.assert_close(found.gram, spread.T @ inputs)
    torch.testing.assert_close(found.cross, spread.T @ targets)
    torch.testing.assert_close(found.inputs, spread.sum(dim=0))
    torch.testing.assert_close(found.targets, (targets * weights[:, None]).sum(dim=0))
    torch.testing.assert_close(found.square, (targets.square() * weights[:, None]).sum())


@given(seed=st.integers(0, 999), times=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_a_weight_is_how_often_a_token_counts(seed: int, times: list[int]) -> None:
    inputs, targets, _ = drawn(seed, 8)
    repeats = torch.tensor(times)
    repeated = summed(inputs.repeat_interleave(repeats, dim=0), targets.repeat_interleave(repeats, dim=0))
    assert_same(summed(inputs, targets, repeats.double()), repeated)


def test_without_weights_every_token_counts_once() -> None:
    inputs, targets, _ = drawn(0, 20)
    assert_same(summed(inputs, targets), summed(inputs, targets, torch.ones(20)))


@given(seed=st.integers(0, 999), kept=st.lists(st.integers(0, K - 1), min_size=1, max_size=K, unique=True))
def test_columns_are_the_sums_of_the_selected_inputs(seed: int, kept: list[int]) -> None:
    inputs, targets, weights = drawn(seed, 15)
    chosen = torch.tensor(kept)
    assert_same(
        summed(inputs, targets, weights).columns(chosen), summed(inputs[:, chosen].contiguous(), targets, weights)
    )


@given(seed=st.integers(0, 999), tokens=st.integers(1, 30), biased=st.booleans())
def test_the_error_is_the_weighted_one_of_the_outputs_relative_to_the_targets(
    seed: int, tokens: int, biased: bool
) -> None:
    inputs, targets, weights = drawn(seed, tokens)
    weight, bias = layer(seed + 1, biased=biased)
    output = inputs @ weight.T + (0 if bias is None else bias)
    lost = (weights[:, None] * (targets - output).square()).sum() / (weights[:, None] * targets.square()).sum()
    assert summed(inputs, targets, weights).error(weight, bias) == pytest.approx(float(lost), rel=1e-9)


def test_the_error_of_what_fits_exactly_is_nothing_and_never_less() -> None:
    for seed in range(20):
        inputs, _, weights = drawn(seed, 15)
        weight, bias = layer(seed, biased=True)
        error = summed(inputs, inputs @ weight.T + bias, weights).error(weight, bias)
        assert 0 <= error < 1e-12


def test_the_error_without_any_tokens_is_nothing() -> None:
    assert Moments.none(K, OUT).error(*layer(0, biased=True)) == 0


@given(seed=st.integers(0, 999), biased=st.booleans())
def test_given_has_what_a_projection_makes_of_the_inputs_as_targets(seed: int, biased: bool) -> None:
    inputs, targets, weights = drawn(seed, 12)
    weight, bias = layer(seed + 1, biased=biased)
    made = inputs @ weight.T + (0 if bias is None else bias)
    found = summed(inputs, targets, weights).given(weight, bias)
    assert_same(found, summed(inputs, made, weights), but=("square",))
    assert found.square.isnan(), "nothing is judged by these"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_as_singles(dtype: torch.dtype) -> None:
    inputs, targets, weights = drawn(0, 300)
    halves = (inputs * 300).to(dtype), (targets * 300).to(dtype)
    found = summed(*halves, weights.float())
    exact = summed(*(half.double() for half in halves), weights)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-4, atol=1e-2)


def test_wide_sums_are_kept_in_single_precision() -> None:
    assert Moments.none(method._DOUBLE_WIDTH, 1).gram.dtype is torch.float64
    wide = Moments.none(method._DOUBLE_WIDTH + 1, 1)
    assert wide.gram.dtype is wide.cross.dtype is wide.inputs.dtype is torch.float32
    assert wide.weight.dtype is wide.square.dtype is torch.float64


@pytest.mark.parametrize("width", [512, 513, 520, 1000])
def test_a_gram_matrix_by_strips_is_the_whole_product(width: int) -> None:
    """Above 512 inputs only strips at and above the diagonal are multiplied."""
    generator = torch.Generator().manual_seed(width)
    chunks = [torch.randn(5, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    gram = torch.zeros(width, width, dtype=torch.float64)
    for chunk in chunks:
        add_gram(gram, chunk)
    torch.testing.assert_close(gram, sum(chunk.T @ chunk for chunk in chunks))
