"""Every closed form against an explicit one: design matrices, augmented systems, small dense solves in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spinecli.pruning.recovery.least_squares as least_squares
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery.least_squares import (
    MASK_RIDGE,
    LayerProblem,
    Solution,
    recover,
    recover_quickly,
    refit,
    refits,
    tune_mask,
    untuned,
)


def problem_of(
    seed: int, tokens: int = 50, k: int = 6, out: int = 4, *, bias: bool = False, noise: float = 1.0
) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inputs, weight = draw(tokens, k) @ draw(k, k) / k**0.5 + 0.5, draw(out, k)
    own = draw(out) if bias else None
    targets = inputs @ weight.T + noise * draw(tokens, out) + (0 if own is None else own)
    return LayerProblem(inputs, targets, weight, own)


def single(problem: LayerProblem) -> LayerProblem:
    bias = None if problem.bias is None else problem.bias.float()
    return LayerProblem(problem.inputs.float(), problem.targets.float(), problem.weight.float(), bias)


def squared_error(problem: LayerProblem, solution: Solution) -> float:
    return float((problem.targets - problem.output(solution)).square().sum())


def centred(problem: LayerProblem) -> LayerProblem:
    return replace(
        problem,
        inputs=problem.inputs - problem.inputs.mean(dim=0),
        targets=problem.targets - problem.targets.mean(dim=0),
        bias=None,
    )


def explicit_mask(problem: LayerProblem, ridge: float = MASK_RIDGE) -> Tensor:
    """The scales, from the (tokens * d_model, k) matrix whose column j is h_j ⊗ W_:j."""
    design = torch.einsum("tj,oj->toj", problem.inputs, problem.weight).flatten(0, 1)
    targets = problem.targets if problem.bias is None else problem.targets - problem.bias
    right = targets.flatten() - design.sum(dim=1)
    damping = (ridge * design.square().sum(dim=0).mean()).sqrt()
    k = design.shape[1]
    stacked = torch.cat([design, damping * torch.eye(k, dtype=torch.float64)])
    padded = torch.cat([right, torch.zeros(k, dtype=torch.float64)]).unsqueeze(1)
    return (1 + torch.linalg.lstsq(stacked, padded).solution.squeeze(1)).clamp(0, 3)


def explicit_refit(problem: LayerProblem, ridge: float) -> Tensor:
    targets = problem.targets if problem.bias is None else problem.targets - problem.bias
    k = problem.weight.shape[1]
    damping = (ridge * problem.inputs.square().sum() / k).sqrt()
    stacked = torch.cat([problem.inputs, damping * torch.eye(k, dtype=torch.float64)])
    padded = torch.cat([targets, damping * problem.weight.T])
    return torch.linalg.lstsq(stacked, padded, driver="gelsd").solution.T


@given(seed=st.integers(0, 999), bias=st.booleans())
def test_nothing_to_recover_leaves_everything_as_it_is(seed: int, bias: bool) -> None:
    problem = problem_of(seed, bias=bias, noise=0.0)
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
    problem = problem_of(seed)
    design = torch.einsum("tj,oj->toj", problem.inputs, problem.weight).flatten(0, 1)
    normal = (problem.weight.T @ problem.weight) * least_squares._gram(problem.inputs, None, torch.float64)
    torch.testing.assert_close(normal, design.T @ design)
    assert torch.equal(normal, normal.T)
    assert torch.linalg.eigvalsh(normal).min() > -1e-9 * normal.diagonal().max()


@given(seed=st.integers(0, 999), bias=st.booleans(), noise=st.sampled_from([0.3, 3.0, 30.0]))
def test_mask_equals_the_explicit_solution(seed: int, bias: bool, noise: float) -> None:
    problem = problem_of(seed, bias=bias, noise=noise)
    scales = tune_mask(problem).scales
    torch.testing.assert_close(scales, explicit_mask(problem), atol=1e-6, rtol=0)


@given(seed=st.integers(0, 999))
def test_mask_with_bias_equals_the_explicit_solution_of_the_centred_problem(seed: int) -> None:
    problem = problem_of(seed, bias=True)
    solution = tune_mask(problem, with_bias=True)
    torch.testing.assert_close(solution.scales, explicit_mask(centred(problem)), atol=1e-6, rtol=0)
    leftover = (problem.targets - problem.inputs @ solution.weight.T).mean(dim=0)
    torch.testing.assert_close(solution.bias, leftover)


@given(seed=st.integers(0, 999), noise=st.sampled_from([1.0, 30.0]))
def test_scales_stay_in_their_range_and_are_what_was_folded(seed: int, noise: float) -> None:
    problem = problem_of(seed, noise=noise)
    solution = tune_mask(problem)
    assert solution.scales is not None
    assert solution.scales.min() >= 0
    assert solution.scales.max() <= 3
    folded = problem.output(solution)
    torch.testing.assert_close(folded, (problem.inputs * solution.scales) @ problem.weight.T)


@given(seed=st.integers(0, 999), tokens=st.integers(1, 60), bias=st.booleans(), with_bias=st.booleans())
def test_no_answer_fits_worse_than_the_projection_as_it_is(seed: int, tokens: int, bias: bool, with_bias: bool) -> None:
    problem = problem_of(seed, tokens=tokens, bias=bias)
    before = squared_error(problem, untuned(problem))
    for ridge in (0.003, 1.0):
        assert squared_error(problem, refit(problem, ridge, with_bias=with_bias)) <= before * (1 + 1e-9) + 1e-9
    solution = tune_mask(problem, with_bias=with_bias)
    if ((solution.scales > 0) & (solution.scales < 3)).all():  # clipping may leave the optimum
        assert squared_error(problem, solution) <= before * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ridge", [0.003, 0.1, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 8, 40])
def test_refit_equals_the_explicit_ridge_solution_in_both_forms(tokens: int, ridge: float, with_bias: bool) -> None:
    """k = 7: below seven tokens the dual form is solved, from seven on the primal one."""
    problem = problem_of(3, tokens=tokens, k=7, bias=True)
    solution = refit(problem, ridge, with_bias=with_bias)
    if not with_bias:
        torch.testing.assert_close(solution.weight, explicit_refit(problem, ridge), atol=1e-7, rtol=1e-7)
        assert solution.bias is problem.bias
    elif tokens > 1:
        torch.testing.assert_close(solution.weight, explicit_refit(centred(problem), ridge), atol=1e-7, rtol=1e-7)
        leftover = (problem.targets - problem.inputs @ solution.weight.T).mean(dim=0)
        torch.testing.assert_close(solution.bias, leftover)


def test_a_bias_without_ridge_equals_the_augmented_system() -> None:
    problem = problem_of(5, tokens=80)
    augmented = torch.cat([problem.inputs, torch.ones(80, 1, dtype=torch.float64)], dim=1)
    exact = torch.linalg.lstsq(augmented, problem.targets).solution.T
    solution = refit(problem, 1e-13, with_bias=True)
    torch.testing.assert_close(solution.weight, exact[:, :-1], atol=1e-6, rtol=0)
    torch.testing.assert_close(solution.bias, exact[:, -1], atol=1e-6, rtol=0)


def test_several_ridges_at_once_equal_one_at_a_time() -> None:
    for tokens in (5, 50):
        problem = problem_of(2, tokens=tokens)
        for ridge, solution in refits(problem, (0.01, 0.1, 1.0)):
            assert torch.equal(solution.weight, refit(problem, ridge).weight)


def test_a_growing_ridge_draws_the_answer_back_to_the_weights() -> None:
    problem = problem_of(1)
    distances = [float((s.weight - problem.weight).norm()) for _, s in refits(problem, (0.001, 0.1, 10.0, 1e6))]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4


@pytest.mark.parametrize("tokens", [4, 50])
def test_chunks_and_single_precision_change_little(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    problem = problem_of(0, tokens=tokens, bias=True)
    whole = [
        tune_mask(problem),
        tune_mask(problem, with_bias=True),
        refit(problem, 0.1),
        refit(problem, 0.1, with_bias=True),
    ]
    monkeypatch.setattr(least_squares, "_CHUNK_TOKENS", 3)
    monkeypatch.setattr(least_squares, "_DOUBLE_SIZE", 0)
    small = single(problem)
    parts = [tune_mask(small), tune_mask(small, with_bias=True), refit(small, 0.1), refit(small, 0.1, with_bias=True)]
    for one, other in zip(whole, parts, strict=True):
        assert other.weight.dtype is torch.float32
        torch.testing.assert_close(other.weight.double(), one.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4, 300])
def test_halves_do_not_overflow(dtype: torch.dtype, tokens: int) -> None:
    exact = problem_of(0, tokens=tokens)
    exact = replace(exact, inputs=exact.inputs * 40, targets=exact.targets * 40)
    half = LayerProblem(exact.inputs.to(dtype), exact.targets.to(dtype), exact.weight.to(dtype), None)
    for found, wanted in ((tune_mask(half), tune_mask(exact)), (refit(half, 0.3), refit(exact, 0.3))):
        assert found.weight.dtype is dtype
        torch.testing.assert_close(found.weight.double(), wanted.weight, atol=0.06, rtol=0.06)


def test_dead_inputs_are_left_alone() -> None:
    problem = problem_of(0, tokens=20)
    problem.inputs[:, 2] = 0
    dead = replace(problem, inputs=torch.zeros_like(problem.inputs))
    for changed in (problem, dead):
        for solution in (tune_mask(changed), refit(changed, 0.1)):
            assert solution.weight.isfinite().all()
            torch.testing.assert_close(solution.weight[:, 2], problem.weight[:, 2])


def test_copies_of_an_input_do_not_break_the_solve() -> None:
    problem = single(problem_of(0))
    problem.inputs[:, 1] = problem.inputs[:, 0]
    for solution in (tune_mask(problem), refit(problem, 0.0)):
        assert solution.weight.isfinite().all()


def test_relative_error_is_relative_to_the_targets() -> None:
    problem = problem_of(0, bias=True)
    by_hand = squared_error(problem, untuned(problem)) / float(problem.targets.square().sum())
    assert problem.relative_error(untuned(problem)) == pytest.approx(by_hand)
    silent = Solution(torch.zeros_like(problem.weight), torch.zeros(4, dtype=torch.float64))
    assert problem.relative_error(silent) == pytest.approx(1)


def test_measuring_does_not_change_the_problem() -> None:
    problem = problem_of(0, bias=True)
    copies = [value.clone() for value in (problem.inputs, problem.targets, problem.weight)]
    recover(problem, 10, TuneMethod.auto)
    assert all(
        torch.equal(a, b) for a, b in zip(copies, (problem.inputs, problem.targets, problem.weight), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_holds_what_will_be_stored(dtype: torch.dtype) -> None:
    solution = tune_mask(single(problem_of(0, bias=True)), with_bias=True)
    rounded = solution.rounded(dtype)
    assert rounded.weight.dtype is torch.float32
    assert torch.equal(rounded.weight, solution.weight.to(dtype).float())
    assert rounded.bias is not None
    assert solution.bias is not None
    assert torch.equal(rounded.bias, solution.bias.to(dtype).float())
    assert rounded.scales is solution.scales
    assert Solution(solution.weight, None).rounded(dtype).bias is None


@pytest.mark.parametrize("method", TuneMethod)
@given(seed=st.integers(0, 999), bias=st.booleans(), held_out=st.integers(1, 30))
def test_recovery_is_never_worse_on_held_out_tokens(method: TuneMethod, seed: int, bias: bool, held_out: int) -> None:
    problem = problem_of(seed, tokens=40, bias=bias, noise=2.0)
    found = recover(problem, held_out, method)
    judging = problem.rows(40 - held_out, 40)
    assert found.error_before == judging.relative_error(untuned(problem))
    assert found.error_after == judging.relative_error(found.solution)
    assert found.error_after <= found.error_before
    assert (found.choice == "untuned") == (found.error_after == found.error_before)
    if method is not TuneMethod.mask_bias and not bias:
        assert found.solution.bias is None


def test_held_out_tokens_are_not_fitted_to() -> None:
    problem = problem_of(0, tokens=40)
    changed = replace(problem, targets=problem.targets.clone())
    changed.targets[30:] *= 1.01
    one, other = (recover(each, 10, TuneMethod.mask).solution.weight for each in (problem, changed))
    assert torch.equal(one, other)


def test_methods_choose_among_their_own_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = problem_of(0, tokens=200, noise=0.0)
    scaled = replace(problem, targets=(problem.inputs * torch.rand(6, generator=generator)) @ problem.weight.T)
    assert recover(scaled, 40, TuneMethod.mask).choice == "mask"
    assert recover(scaled, 40, TuneMethod.mask_bias).choice == "mask+bias"
    assert recover(scaled, 40, TuneMethod.lsq).choice.startswith("lsq ")
    assert recover(scaled, 40, TuneMethod.auto).error_after < 1e-3


def test_the_quick_recovery_fits_without_the_held_out_tokens() -> None:
    problem = problem_of(0, tokens=40)
    found = recover_quickly(problem, 10)
    assert torch.equal(found.solution.weight, refit(problem.rows(0, 30), 0.03).weight)
