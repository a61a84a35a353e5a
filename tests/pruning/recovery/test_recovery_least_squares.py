"""Every closed form against an explicit one: design matrices, augmented systems, small dense solves in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spinecli.pruning.method as method
import spinecli.pruning.recovery.least_squares as least_squares
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery.least_squares import (
    MASK_RIDGE,
    RIDGES,
    LayerProblem,
    Refits,
    Solution,
    recover,
    refit,
    tune_mask,
    untuned,
)
from spinecli.pruning.recovery.moments import Moments


def refits(problem: LayerProblem, ridges: Sequence[float], *, with_bias: bool = False) -> list[tuple[str, Solution]]:
    answers = Refits(problem, with_bias=with_bias)
    return [answers.at(ridge) for ridge in ridges]


@dataclass(frozen=True, eq=False)
class Tokens:
    """What `Moments` sums up."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.inputs[part], self.targets[part], self.weights[part])

    @property
    def moments(self) -> Moments:
        found = Moments.none(self.inputs.shape[1], self.targets.shape[1])
        found.observe(self.inputs, self.targets, self.weights)
        return found

    @property
    def rooted(self) -> Tensor:
        """sqrt(w), (tokens, 1): a weighted sum of squares is a plain one of what was multiplied with it."""
        return self.weights.sqrt()[:, None]

    @property
    def centred(self) -> Tokens:
        total = self.weights.sum()
        inputs, targets = (
            each - (self.weights[:, None] * each).sum(dim=0) / total for each in (self.inputs, self.targets)
        )
        return Tokens(inputs, targets, self.weights)

    def less(self, bias: Tensor | None) -> Tokens:
        return self if bias is None else replace(self, targets=self.targets - bias)

    def error(self, solution: Solution) -> float:
        """Weighted and squared."""
        output = self.inputs @ solution.weight.T
        left = self.less(solution.bias).targets - output
        return float((self.weights[:, None] * left.square()).sum())


@dataclass(frozen=True, eq=False)
class Layer:
    """A projection, its tokens to fit to and to judge by, and the inputs of it that stay."""

    fitting: Tokens
    judging: Tokens
    weight: Tensor
    bias: Tensor | None
    kept: int | None = None
    """Inputs that stay, the first ones; the dense projection then gives a second target."""

    @property
    def own(self) -> Tokens | None:
        """The tokens with what the dense projection gives as targets."""
        if self.kept is None:
            return None
        return replace(
            self.fitting, targets=self.fitting.inputs @ self.weight.T + (0 if self.bias is None else self.bias)
        )

    def of_kept(self, tokens: Tokens) -> Tokens:
        return replace(tokens, inputs=tokens.inputs[:, : self.kept])

    @property
    def problem(self) -> LayerProblem:
        own = None if self.own is None else self.of_kept(self.own).moments
        fitting, judging = (self.of_kept(each).moments for each in (self.fitting, self.judging))
        return LayerProblem(fitting, judging, self.weight[:, : self.kept], self.bias, own)


def layer_of(
    seed: int,
    tokens: int = 50,
    k: int = 6,
    out: int = 4,
    *,
    bias: bool = False,
    noise: float = 1.0,
    judging: int = 20,
    kept: int | None = None,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    total = tokens + judging
    inputs, weight = draw(total, k) @ draw(k, k) / k**0.5 + 0.5, draw(out, k)
    own = draw(out) if bias else None
    targets = inputs @ weight.T + noise * draw(total, out) + (0 if own is None else own)
    seen = Tokens(inputs, targets, draw(total).exp())
    return Layer(seen[:tokens], seen[tokens:], weight, own, kept)


def explicit_mask(tokens: Tokens, weight: Tensor, bias: Tensor | None, ridge: float = MASK_RIDGE) -> Tensor:
    """The scales, from the (tokens * d_model, k) matrix whose column j is sqrt(w) h_j ⊗ W_:j."""
    design = torch.einsum("tj,oj->toj", tokens.rooted * tokens.inputs, weight).flatten(0, 1)
    right = (tokens.rooted * tokens.less(bias).targets).flatten() - design.sum(dim=1)
    damping = (ridge * design.square().sum(dim=0).mean()).sqrt()
    k = design.shape[1]
    stacked = torch.cat([design, damping * torch.eye(k, dtype=torch.float64)])
    padded = torch.cat([right, torch.zeros(k, dtype=torch.float64)]).unsqueeze(1)
    return (1 + torch.linalg.lstsq(stacked, padded).solution.squeeze(1)).clamp(0, 3)


def explicit_refit(tokens: Tokens, weight: Tensor, bias: Tensor | None, ridge: float) -> Tensor:
    rooted = tokens.rooted * tokens.inputs
    k = weight.shape[1]
    damping = (ridge * rooted.square().sum() / k).sqrt()
    stacked = torch.cat([rooted, damping * torch.eye(k, dtype=torch.float64)])
    padded = torch.cat([tokens.rooted * tokens.less(bias).targets, damping * weight.T])
    return torch.linalg.lstsq(stacked, padded, driver="gelsd").solution.T


def leftover(tokens: Tokens, weight: Tensor) -> Tensor:
    """The weighted mean of what a projection without bias leaves."""
    left = tokens.targets - tokens.inputs @ weight.T
    return (tokens.weights[:, None] * left).sum(dim=0) / tokens.weights.sum()


@given(seed=st.integers(0, 999), bias=st.booleans())
def test_nothing_to_recover_leaves_everything_as_it_is(seed: int, bias: bool) -> None:
    problem = layer_of(seed, bias=bias, noise=0.0).problem
    scales = tune_mask(problem).scales
    assert scales is not None
    torch.testing.assert_close(scales, torch.ones(6, dtype=torch.float64), atol=1e-8, rtol=0)
    for solution in (tune_mask(problem), refit(problem, 0.1)):
        torch.testing.assert_close(solution.weight, problem.weight, atol=1e-7, rtol=0)
        assert solution.bias is problem.bias
    for solution in (tune_mask(problem, with_bias=True), refit(problem, 0.1, with_bias=True)):
        torch.testing.assert_close(solution.weight, problem.weight, atol=1e-7, rtol=0)
        expected = torch.zeros(4, dtype=torch.float64) if problem.bias is None else problem.bias
        torch.testing.assert_close(solution.bias, expected, atol=1e-7, rtol=0)


@given(seed=st.integers(0, 999))
def test_the_normal_matrix_of_a_mask_is_a_product_of_two_gram_matrices(seed: int) -> None:
    layer = layer_of(seed)
    design = torch.einsum("tj,oj->toj", layer.fitting.rooted * layer.fitting.inputs, layer.weight).flatten(0, 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(least_squares, "_SLICE_ROWS", 4)
        normal = least_squares._mask_normal(layer.fitting.moments.gram, layer.weight)
    torch.testing.assert_close(normal, design.T @ design)


@given(seed=st.integers(0, 999), bias=st.booleans(), noise=st.sampled_from([0.3, 3.0, 30.0]))
def test_mask_equals_the_explicit_solution(seed: int, bias: bool, noise: float) -> None:
    layer = layer_of(seed, bias=bias, noise=noise)
    scales = tune_mask(layer.problem).scales
    torch.testing.assert_close(scales, explicit_mask(layer.fitting, layer.weight, layer.bias), atol=1e-6, rtol=0)


@given(seed=st.integers(0, 999))
def test_mask_with_bias_equals_the_explicit_solution_of_the_centred_problem(seed: int) -> None:
    layer = layer_of(seed, bias=True)
    solution = tune_mask(layer.problem, with_bias=True)
    expected = explicit_mask(layer.fitting.centred, layer.weight, None)
    torch.testing.assert_close(solution.scales, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(solution.bias, leftover(layer.fitting, solution.weight))


@given(seed=st.integers(0, 999), noise=st.sampled_from([1.0, 30.0]))
def test_scales_stay_in_their_range_and_are_what_was_folded(seed: int, noise: float) -> None:
    layer = layer_of(seed, noise=noise)
    solution = tune_mask(layer.problem)
    assert solution.scales is not None
    assert solution.scales.min() >= 0
    assert solution.scales.max() <= 3
    inputs = layer.fitting.inputs
    torch.testing.assert_close(inputs @ solution.weight.T, (inputs * solution.scales) @ layer.weight.T)


@given(seed=st.integers(0, 999), tokens=st.integers(1, 60), bias=st.booleans(), with_bias=st.booleans())
def test_no_answer_fits_worse_than_the_projection_as_it_is(seed: int, tokens: int, bias: bool, with_bias: bool) -> None:
    layer = layer_of(seed, tokens=tokens, bias=bias)
    problem = layer.problem
    before = layer.fitting.error(untuned(problem))
    for ridge in (0.003, 1.0):
        assert layer.fitting.error(refit(problem, ridge, with_bias=with_bias)) <= before * (1 + 1e-9) + 1e-9
    solution = tune_mask(problem, with_bias=with_bias)
    if ((solution.scales > 0) & (solution.scales < 3)).all():  # clipping may leave the optimum
        assert layer.fitting.error(solution) <= before * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ridge", [0.003, 0.1, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 8, 40])
def test_refit_equals_the_explicit_ridge_solution(tokens: int, ridge: float, with_bias: bool) -> None:
    """With k = 7 also for fewer tokens than inputs, where the weights decide what the tokens do not."""
    layer = layer_of(3, tokens=tokens, k=7, bias=True)
    solution = refit(layer.problem, ridge, with_bias=with_bias)
    if not with_bias:
        expected = explicit_refit(layer.fitting, layer.weight, layer.bias, ridge)
        torch.testing.assert_close(solution.weight, expected, atol=1e-7, rtol=1e-7)
        assert solution.bias is layer.bias
    elif tokens > 1:
        expected = explicit_refit(layer.fitting.centred, layer.weight, None, ridge)
        torch.testing.assert_close(solution.weight, expected, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(solution.bias, leftover(layer.fitting, solution.weight))


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_tokens_weight_is_how_often_it_counts(with_bias: bool) -> None:
    layer = layer_of(4, tokens=30, bias=True)
    times = torch.arange(30) % 4
    once = replace(layer.fitting, weights=times.double())
    repeated = Tokens(
        layer.fitting.inputs.repeat_interleave(times, dim=0),
        layer.fitting.targets.repeat_interleave(times, dim=0),
        torch.ones(int(times.sum()), dtype=torch.float64),
    )
    weighted, plain = (replace(layer, fitting=each).problem for each in (once, repeated))
    for answer in (tune_mask, lambda problem, with_bias: refit(problem, 0.1, with_bias=with_bias)):
        one, other = (answer(problem, with_bias=with_bias) for problem in (weighted, plain))
        torch.testing.assert_close(one.weight, other.weight)
        torch.testing.assert_close(one.bias, other.bias)


def test_a_bias_without_ridge_equals_the_augmented_system() -> None:
    layer = layer_of(5, tokens=80)
    rooted = layer.fitting.rooted
    augmented = torch.cat([rooted * layer.fitting.inputs, rooted], dim=1)
    exact = torch.linalg.lstsq(augmented, rooted * layer.fitting.targets).solution.T
    solution = refit(layer.problem, 1e-13, with_bias=True)
    torch.testing.assert_close(solution.weight, exact[:, :-1], atol=1e-6, rtol=0)
    torch.testing.assert_close(solution.bias, exact[:, -1], atol=1e-6, rtol=0)


def with_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(least_squares, "_best_share", lambda *_: share)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_targets_is_the_answer_to_their_mixture(
    monkeypatch: pytest.MonkeyPatch, share: float, with_bias: bool
) -> None:
    """At 1 the answer to the teacher's targets, at 0 to what the dense projection makes of all inputs."""
    layer = layer_of(6, bias=True, kept=4)
    with_share(monkeypatch, share)
    found = refit(layer.problem, 0.1, with_bias=with_bias)
    assert layer.own is not None
    targets = share * layer.fitting.targets + (1 - share) * layer.own.targets
    mixed = layer.of_kept(replace(layer.fitting, targets=targets))
    weight = layer.weight[:, :4]
    expected = (
        explicit_refit(mixed.centred, weight, None, 0.1)
        if with_bias
        else explicit_refit(mixed, weight, layer.bias, 0.1)
    )
    torch.testing.assert_close(found.weight, expected)
    torch.testing.assert_close(found.bias, leftover(mixed, found.weight) if with_bias else layer.bias)
    [(name, _)] = refits(layer.problem, (0.1,), with_bias=with_bias)
    assert name == f"lsq 0.1, {share:.0%} of the teacher's targets"


@given(
    seed=st.integers(0, 999), bias=st.booleans(), noise=st.sampled_from([0.1, 1.0, 5.0]), ridge=st.sampled_from(RIDGES)
)
def test_no_other_share_is_better_on_the_judging_tokens(seed: int, bias: bool, noise: float, ridge: float) -> None:
    layer = layer_of(seed, tokens=12, bias=bias, noise=noise, kept=4)
    problem = layer.problem
    least = problem.error(refit(problem, ridge))
    for share in torch.linspace(0, 1, 11).tolist():
        with pytest.MonkeyPatch.context() as patched:
            with_share(patched, share)
            assert least <= problem.error(refit(problem, ridge)) * (1 + 1e-9)


@given(seed=st.integers(0, 999), ridge=st.sampled_from(RIDGES))
def test_no_other_share_is_better_with_a_bias_that_suits_the_judging_tokens(seed: int, ridge: float) -> None:
    layer = layer_of(seed, tokens=12, bias=True, kept=4)
    centred = layer.of_kept(layer.judging.centred)

    def lost() -> float:
        return centred.error(Solution(refit(layer.problem, ridge, with_bias=True).weight, None))

    least = lost()
    for share in torch.linspace(0, 1, 11).tolist():
        with pytest.MonkeyPatch.context() as patched:
            with_share(patched, share)
            assert least <= lost() * (1 + 1e-9)


def share_of(layer: Layer, ridge: float = 0.03) -> float:
    """The share of the teacher's targets that is chosen, as it is named."""
    [(name, _)] = refits(layer.problem, (ridge,))
    return float(name.split(", ")[1].split("%")[0]) / 100


def test_many_tokens_bear_the_teachers_targets_and_a_few_noisy_ones_do_not() -> None:
    for seed in range(10):
        layer = layer_of(seed, tokens=400, noise=0.1, kept=4, judging=200)
        fitting, judging = (
            replace(each, targets=each.targets + each.inputs[:, :4].flip(1)) for each in (layer.fitting, layer.judging)
        )
        assert share_of(replace(layer, fitting=fitting, judging=judging)) >= 0.9
    few = [share_of(layer_of(seed, tokens=6, noise=5.0, kept=4, judging=200)) for seed in range(10)]
    assert sum(few) / len(few) < 0.3


def test_judging_tokens_decide_on_the_share_and_on_nothing_else() -> None:
    layer = layer_of(8, tokens=12, noise=2.0, kept=4)
    other = replace(layer, judging=layer_of(9, tokens=12).judging)
    one, changed = (refit(each.problem, 0.1).weight for each in (layer, other))
    ends = []
    for share in (0.0, 1.0):
        with pytest.MonkeyPatch.context() as patched:
            with_share(patched, share)
            ends.append(refit(layer.problem, 0.1).weight)
    direction = (ends[1] - ends[0]).flatten()
    for weight in (one, changed):
        moved = (weight - ends[0]).flatten()
        along = float(moved @ direction / (direction @ direction))
        assert -1e-9 <= along <= 1 + 1e-9
        torch.testing.assert_close(moved, along * direction)
    alone = [refit(replace(each.problem, own=None), 0.1).weight for each in (layer, other)]
    assert torch.equal(*alone)


def test_several_ridges_at_once_equal_one_at_a_time() -> None:
    for tokens in (5, 50):
        problem = layer_of(2, tokens=tokens, kept=5).problem
        for ridge, (_, solution) in zip((0.01, 0.1, 1.0), refits(problem, (0.01, 0.1, 1.0)), strict=True):
            assert torch.equal(solution.weight, refit(problem, ridge).weight)


def test_a_growing_ridge_draws_the_answer_back_to_the_weights() -> None:
    problem = layer_of(1).problem
    distances = [float((s.weight - problem.weight).norm()) for _, s in refits(problem, (0.001, 0.1, 10.0, 1e6))]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4


def answers(problem: LayerProblem) -> list[Solution]:
    return [
        tune_mask(problem),
        tune_mask(problem, with_bias=True),
        refit(problem, 0.1),
        refit(problem, 0.1, with_bias=True),
    ]


def single(layer: Layer) -> Layer:
    fitting, judging = (
        Tokens(each.inputs.float(), each.targets.float(), each.weights.float())
        for each in (layer.fitting, layer.judging)
    )
    return Layer(fitting, judging, layer.weight.float(), None if layer.bias is None else layer.bias.float(), layer.kept)


@pytest.mark.parametrize("kept", [None, 4])
@pytest.mark.parametrize("tokens", [4, 50])
def test_single_precision_changes_little(monkeypatch: pytest.MonkeyPatch, tokens: int, kept: int | None) -> None:
    layer = layer_of(0, tokens=tokens, bias=True, kept=kept)
    whole = answers(layer.problem)
    monkeypatch.setattr(method, "_DOUBLE_WIDTH", 0)
    small = single(layer).problem
    assert small.fitting.gram.dtype is torch.float32
    for one, other in zip(whole, answers(small), strict=True):
        assert other.weight.dtype is torch.float32
        torch.testing.assert_close(other.weight.double(), one.weight, atol=1e-3, rtol=1e-3)


def test_dead_inputs_are_left_alone() -> None:
    layer = layer_of(0, tokens=20)
    layer.fitting.inputs[:, 2] = 0
    dead = replace(layer, fitting=replace(layer.fitting, inputs=torch.zeros_like(layer.fitting.inputs)))
    for changed in (layer, dead):
        for solution in (tune_mask(changed.problem), refit(changed.problem, 0.1)):
            assert solution.weight.isfinite().all()
            torch.testing.assert_close(solution.weight[:, 2], layer.weight[:, 2])


def test_copies_of_an_input_do_not_break_the_solve() -> None:
    layer = layer_of(0)
    layer.fitting.inputs[:, 1] = layer.fitting.inputs[:, 0]
    for solution in (tune_mask(single(layer).problem), refit(single(layer).problem, 0.0)):
        assert solution.weight.isfinite().all()


def test_the_error_is_relative_to_the_targets_of_the_judging_tokens() -> None:
    layer = layer_of(0, bias=True)
    problem = layer.problem
    silent = Solution(torch.zeros_like(layer.weight), torch.zeros(4, dtype=torch.float64))
    by_hand = layer.judging.error(untuned(problem)) / layer.judging.error(silent)
    assert problem.error(untuned(problem)) == pytest.approx(by_hand)
    assert problem.error(silent) == pytest.approx(1)


def test_measuring_does_not_change_the_problem() -> None:
    problem = layer_of(0, bias=True, kept=4).problem
    assert problem.own is not None
    parts = [problem.weight, problem.bias]
    for moments in (problem.fitting, problem.judging, problem.own):
        parts += [moments.gram, moments.cross, moments.inputs, moments.targets, moments.weight]
    copies = [value.clone() for value in parts]
    recover(problem, TuneMethod.auto)
    recover(problem, TuneMethod.mask_bias)
    assert all(torch.equal(one, other) for one, other in zip(copies, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_holds_what_will_be_stored(dtype: torch.dtype) -> None:
    solution = tune_mask(single(layer_of(0, bias=True)).problem, with_bias=True)
    rounded = solution.rounded(dtype)
    assert rounded.weight.dtype is torch.float32
    assert torch.equal(rounded.weight, solution.weight.to(dtype).float())
    assert rounded.bias is not None
    assert solution.bias is not None
    assert torch.equal(rounded.bias, solution.bias.to(dtype).float())
    assert rounded.scales is solution.scales
    assert Solution(solution.weight, None).rounded(dtype).bias is None


@pytest.mark.parametrize("method", TuneMethod)
@given(
    seed=st.integers(0, 999),
    bias=st.booleans(),
    judging=st.integers(1, 30),
    kept=st.one_of(st.none(), st.integers(1, 5)),
)
def test_recovery_is_never_worse_on_held_out_tokens(
    method: TuneMethod, seed: int, bias: bool, judging: int, kept: int | None
) -> None:
    problem = layer_of(seed, tokens=40 - judging, bias=bias, noise=2.0, judging=judging, kept=kept).problem
    found = recover(problem, method)
    assert found.error_before == problem.error(untuned(problem))
    assert found.error_after == problem.error(found.solution)
    assert found.error_after <= found.error_before
    assert (found.choice == "untuned") == (found.error_after == found.error_before)
    if method is not TuneMethod.mask_bias and not bias:
        assert found.solution.bias is None


def test_ridges_are_tried_downhill_to_the_best() -> None:
    problem = layer_of(3, tokens=12, noise=2.0, kept=4).problem
    errors = {name: problem.error(solution) for name, solution in refits(problem, RIDGES)}
    found = recover(problem, TuneMethod.lsq)
    assert errors[found.choice] == found.error_after == min(errors.values())
    [only] = [name for name, _ in refits(problem, (10.0,))]
    assert recover(problem, TuneMethod.lsq, (10.0,)).choice == only


def gained(layer: Layer) -> Layer:
    """With targets that scales of the inputs give."""
    gains = torch.rand(6, generator=torch.Generator().manual_seed(0))
    fitting, judging = (
        replace(each, targets=(each.inputs * gains) @ layer.weight.T) for each in (layer.fitting, layer.judging)
    )
    return replace(layer, fitting=fitting, judging=judging)


def test_held_out_tokens_are_not_fitted_to() -> None:
    layer = gained(layer_of(0, tokens=40))
    changed = replace(layer, judging=replace(layer.judging, targets=layer.judging.targets * 1.01))
    one, other = (recover(each.problem, TuneMethod.mask) for each in (layer, changed))
    assert one.choice == other.choice == "mask"
    assert torch.equal(one.solution.weight, other.solution.weight)


def test_methods_choose_among_their_own_answers() -> None:
    scaled = gained(layer_of(0, tokens=200, judging=40)).problem
    assert recover(scaled, TuneMethod.mask).choice == "mask"
    assert recover(scaled, TuneMethod.mask_bias).choice == "mask+bias"
    assert recover(scaled, TuneMethod.lsq).choice.startswith("lsq ")
    assert recover(scaled, TuneMethod.auto).error_after < 1e-3
