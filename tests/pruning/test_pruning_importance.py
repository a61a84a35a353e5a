from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from families import Recipe, random_tokens, recipe
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.pruning.method import BlockInfluence, BlockView, InputStatistics, UnitScores
from spinecli.pruning.methods import METHODS
from spinecli.pruning.methods.comp import METRICS, NEURON_METRICS
from spinecli.pruning.scoring import score_checkpoint

Opened = Callable[[Recipe], Checkpoint]


def layer(seed: int, tokens: int = 30, wide: int = 7, out: int = 5) -> tuple[Tensor, Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, wide, generator=generator)
    inputs = torch.randn(tokens, wide, generator=generator) * torch.rand(wide, generator=generator) + 0.3
    statistics = InputStatistics(wide, gram=True)
    for chunk in inputs.split(11):
        statistics.observe(chunk, chunk @ weight.T)
    return weight, inputs, statistics


@given(seed=st.integers(0, 999), chunk=st.integers(1, 40))
def test_statistics_equal_the_naive_ones(seed: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = torch.randn(30, 4, generator=generator) + 2, torch.randn(3, 4, generator=generator)
    statistics = InputStatistics(4, gram=True)
    for part in inputs.split(chunk):
        statistics.observe(part, part @ weight.T)
    x = inputs.double().numpy()
    assert statistics.tokens == 30
    np.testing.assert_allclose(statistics.norms, np.linalg.norm(x, axis=0))
    np.testing.assert_allclose(statistics.variances, x.var(axis=0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(statistics.required_gram, x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(statistics.output_square_sum, np.square(x @ weight.double().numpy().T).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    """Three hundred tokens of size 20 exceed the largest float16 when squared and summed."""
    inputs = (20 + torch.randn(300, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    statistics = InputStatistics(4, gram=True)
    statistics.observe(inputs, inputs)
    x = inputs.double().numpy()
    np.testing.assert_allclose(statistics.required_gram, x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(statistics.norms, np.linalg.norm(x, axis=0))
    np.testing.assert_allclose(statistics.output_square_sum, np.square(x).sum())


def test_gram_only_where_asked() -> None:
    with pytest.raises(ValueError, match="Gram"):
        _ = InputStatistics(4).required_gram


@given(seed=st.integers(0, 999))
def test_m0_is_the_exact_change_of_the_output(seed: int) -> None:
    weight, inputs, statistics = layer(seed)
    scores = NEURON_METRICS["m0"](weight, statistics)
    for j in range(weight.shape[1]):
        without = weight.double().clone()
        without[:, j] = 0
        change = torch.linalg.norm(inputs.double() @ weight.double().T - inputs.double() @ without.T)
        torch.testing.assert_close(scores[j], change, rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 999))
def test_m1_and_m2_rank_as_m0_inside_a_layer(seed: int) -> None:
    weight, inputs, statistics = layer(seed)
    m0, m1, m2 = (NEURON_METRICS[name](weight, statistics) for name in ("m0", "m1", "m2"))
    assert m0.argsort().tolist() == m1.argsort().tolist() == m2.argsort().tolist()
    w, x = weight.double().numpy(), inputs.double().numpy()
    np.testing.assert_allclose(m1, m0 / np.linalg.norm(x @ w.T), rtol=1e-5)
    np.testing.assert_allclose(m2, np.linalg.cond(w) * m0 / (np.linalg.norm(w) * np.linalg.norm(x)), rtol=1e-5)


@given(seed=st.integers(0, 999))
def test_m2_of_a_tall_weight_uses_the_same_condition_number(seed: int) -> None:
    weight, inputs, statistics = layer(seed, wide=4, out=9)
    m0, m2 = (NEURON_METRICS[name](weight, statistics) for name in ("m0", "m2"))
    w, x = weight.double().numpy(), inputs.double().numpy()
    np.testing.assert_allclose(m2, np.linalg.cond(w) * m0 / (np.linalg.norm(w) * np.linalg.norm(x)), rtol=1e-5)


def test_m3_follows_the_condition_number_without_the_column() -> None:
    """Exact where the columns are singular directions themselves."""
    values = torch.tensor([5.0, 4.0, 3.0, 2.0])
    weight = torch.cat([torch.diag(values), torch.zeros(4, 1)], dim=1)
    weight[3, 4] = 1.0  # the smallest direction is carried by two columns
    scores = NEURON_METRICS["m3"](weight, InputStatistics(5))
    low = (2.0**2 + 1) ** 0.5
    assert scores[1] == scores[2] == 0
    torch.testing.assert_close(scores[4], torch.tensor(abs(5 / 2 - 5 / low) / (5 / low)).double())


@pytest.mark.parametrize("name", NEURON_METRICS)
def test_metrics_are_finite_and_follow_a_renumbering(name: str) -> None:
    weight, inputs, statistics = layer(4)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    renumbered = InputStatistics(7)
    renumbered.observe(inputs[:, order], inputs @ weight.T)
    before, after = NEURON_METRICS[name](weight, statistics), NEURON_METRICS[name](weight[:, order], renumbered)
    assert before.isfinite().all()
    assert before.dtype is torch.float64
    torch.testing.assert_close(after, before[order], rtol=1e-5, atol=1e-9)


def test_dead_inputs_weigh_nothing_and_break_nothing() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    dead = InputStatistics(4)
    dead.observe(torch.zeros(6, 4), torch.zeros(6, 3))
    for name in ("m0", "m1", "m2"):
        assert NEURON_METRICS[name](weight, dead).tolist() == [0.0] * 4


def test_influence_of_a_block_that_does_nothing_is_zero() -> None:
    influence = BlockInfluence()
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    influence.observe(hidden, hidden)
    influence.observe(hidden, 3 * hidden)
    assert influence.value == pytest.approx(0, abs=1e-12)


def test_influence_is_one_minus_the_mean_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(4, 5, 8, generator=generator), torch.randn(4, 5, 8, generator=generator)
    influence = BlockInfluence()
    for row in range(4):
        influence.observe(before[row], after[row])
    x, y = before.double().reshape(-1, 8).numpy(), after.double().reshape(-1, 8).numpy()
    cosines = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert influence.value == pytest.approx(1 - cosines.mean())
    opposite = BlockInfluence()
    opposite.observe(before, -before)
    assert opposite.value == pytest.approx(2)


@pytest.fixture
def view(opened: Opened) -> Callable[[str], tuple[BlockView, np.ndarray, np.ndarray]]:
    """A loaded block's view, and the inputs of its two output projections."""

    def make(family: str) -> tuple[BlockView, np.ndarray, np.ndarray]:
        from spinecli.checkpoints.stream.observation import observed

        checkpoint = opened(recipe(family, grouped=family != "opt"))
        stream, shape = BlockStream(checkpoint, 10), checkpoint.shape
        hidden = stream.embed(random_tokens(4, 10))
        kept: dict[str, list[Tensor]] = {"attention": [], "feed forward": []}
        attention, feed_forward = InputStatistics(32, gram=True), InputStatistics(40, gram=True)

        def listener(name: str, statistics: InputStatistics) -> Callable[[Tensor, Tensor], None]:
            def observe(inputs: Tensor, outputs: Tensor) -> None:
                kept[name].append(inputs)
                statistics.observe(inputs, outputs)

            return observe

        with stream.block(1) as block:
            listeners = {
                checkpoint.family.attention.output: listener("attention", attention),
                checkpoint.family.feed_forward.output: listener("feed forward", feed_forward),
            }
            with observed(block, listeners):
                stream.run(block, hidden)
            weights = {name: value.detach().clone() for name, value in block.module.named_parameters()}
        block.module.load_state_dict(weights, assign=True)
        found = BlockView(block, checkpoint.family, shape, attention, feed_forward)
        return found, *(torch.cat(kept[name]).double().numpy() for name in kept)

    return make


def naive(method: str, weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    if method == "wanda-sp":
        return (np.abs(weight) * np.linalg.norm(inputs, axis=0)).sum(axis=0)
    if method == "flap":
        return inputs.var(axis=0, ddof=1) * np.square(np.linalg.norm(weight, axis=0))
    return np.linalg.norm(weight, axis=0) * np.linalg.norm(inputs, axis=0)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", ["wanda-sp", "flap", "comp"])
def test_scores_equal_the_naive_formulas(
    view: Callable[[str], tuple[BlockView, np.ndarray, np.ndarray]], family: str, method: str
) -> None:
    seen, attention, feed_forward = view(family)
    scores = METHODS[method]("m0", 0).score(seen)
    by_input = naive(method, seen.attention_output.double().numpy(), attention)
    by_group = by_input.reshape(seen.shape.kv_heads, -1).sum(axis=1)
    np.testing.assert_allclose(scores.kv_groups, by_group, rtol=1e-6)
    by_channel = naive(method, seen.feed_forward_output.double().numpy(), feed_forward)
    np.testing.assert_allclose(scores.channels, by_channel, rtol=1e-6)


def test_magnitude_weighs_all_that_would_leave(
    view: Callable[[str], tuple[BlockView, np.ndarray, np.ndarray]],
) -> None:
    seen, _, _ = view("llama")
    scores = METHODS["magnitude"]("", 0).score(seen)
    weights = {name: seen.weight(f"self_attn.{name}_proj").double() for name in "qkvo"}
    first = (
        weights["q"][:16].square().sum()
        + weights["k"][:8].square().sum()
        + weights["v"][:8].square().sum()
        + weights["o"][:, :16].square().sum()
    )
    torch.testing.assert_close(scores.kv_groups[0], first)
    parts = [seen.weight(f"mlp.{name}_proj").double()[5] for name in ("gate", "up")]
    parts.append(seen.weight("mlp.down_proj").double()[:, 5])
    torch.testing.assert_close(scores.channels[5], sum(part.square().sum() for part in parts))


def same(one: UnitScores, other: UnitScores) -> bool:
    return torch.equal(one.kv_groups, other.kv_groups) and torch.equal(one.channels, other.channels)


def test_random_scores_follow_seed_and_block_alone(
    view: Callable[[str], tuple[BlockView, np.ndarray, np.ndarray]],
) -> None:
    from dataclasses import replace

    seen, _, _ = view("llama")
    elsewhere = replace(seen, block=replace(seen.block, index=2))
    first = METHODS["random"]("", 3).score(seen)
    torch.rand(1)  # the global generator has no say
    assert same(METHODS["random"]("", 3).score(seen), first)
    assert not same(METHODS["random"]("", 4).score(seen), first)
    assert not same(METHODS["random"]("", 3).score(elsewhere), first)


def test_shortgpt_ranks_no_units(view: Callable[[str], tuple[BlockView, np.ndarray, np.ndarray]]) -> None:
    scores = METHODS["shortgpt"]("", 0).score(view("llama")[0])
    assert scores.channels.unique().numel() == scores.kv_groups.unique().numel() == 1


@pytest.mark.parametrize("family", ["qwen3", "opt"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_every_unit(opened: Opened, family: str, metric: str) -> None:
    checkpoint = opened(recipe(family))
    scores = score_checkpoint(BlockStream(checkpoint, 12), random_tokens(6, 12), METHODS["comp"](metric, 0))
    for values in scores.tensors().values():
        assert values.isfinite().all()
    assert len(scores.units) == len(scores.influence) == 3
    assert all(units.channels.unique().numel() > 20 for units in scores.units)
    assert (scores.influence > 0).all()


def test_heads_follow_their_weights_through_the_score(opened: Opened, tmp_path: object) -> None:
    """A KV group whose o_proj columns are tiny is the one that scores lowest."""
    checkpoint = opened(recipe("llama", grouped=True))
    stream = BlockStream(checkpoint, 12)
    for metric in ("m0", "m4"):
        method = METHODS["comp"](metric, 0)

        class Weakened:
            needs_gram = True

            def score(self, view: BlockView, method: object = method) -> UnitScores:
                view.block.linear("self_attn.o_proj").weight[:, 16:] *= 1e-3
                return method.score(view)  # type: ignore[attr-defined]

        found = score_checkpoint(stream, random_tokens(4, 12), Weakened())  # type: ignore[arg-type]
        assert [int(units.kv_groups.argmin()) for units in found.units] == [1, 1, 1]
