from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from families import Recipe, random_tokens, recipe
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.stream.observation import projection_inputs
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery.gated_layer import BranchProblem, BranchRecovery, BranchTuning, refit_branch, tune_branch
from spinecli.pruning.recovery.least_squares import LayerProblem, LayerRecovery, recover, untuned

D_MODEL, CHANNELS = 6, 9


def problem_of(seed: int, tokens: int = 60, *, biased: bool = False) -> BranchProblem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return BranchProblem(
        inputs=draw(tokens, D_MODEL),
        gates=draw(tokens, CHANNELS),
        targets=draw(tokens, D_MODEL),
        weight=draw(CHANNELS, D_MODEL),
        bias=draw(CHANNELS) if biased else None,
        output_weight=draw(D_MODEL, CHANNELS),
        output_bias=draw(D_MODEL) if biased else None,
    )


def output(problem: BranchProblem, weight: Tensor) -> Tensor:
    hidden = problem.inputs @ weight.T
    if problem.bias is not None:
        hidden = hidden + problem.bias
    given = (problem.gates * hidden) @ problem.output_weight.T
    return given if problem.output_bias is None else given + problem.output_bias


def error(problem: BranchProblem, weight: Tensor) -> float:
    return float((problem.targets - output(problem, weight)).double().square().sum())


@given(seed=st.integers(0, 9999), biased=st.booleans())
def test_with_enough_steps_it_is_the_least_squares_answer(seed: int, biased: bool) -> None:
    problem = problem_of(seed, biased=biased)
    found = refit_branch(problem, steps=400, ridge=1e-6)
    columns = torch.stack(
        [
            output(replace(problem, bias=None, output_bias=None), one.view(CHANNELS, D_MODEL)).flatten()
            for one in torch.eye(CHANNELS * D_MODEL)
        ],
        dim=1,
    ).double()
    fixed = output(problem, torch.zeros(CHANNELS, D_MODEL)).flatten().double()
    best = torch.linalg.lstsq(columns, (problem.targets.flatten().double() - fixed)[:, None]).solution
    least = float((problem.targets.flatten().double() - fixed - (columns @ best).squeeze(1)).square().sum())
    assert error(problem, found) <= least * 1.02 + 1e-6


@given(seed=st.integers(0, 9999))
def test_every_further_step_lowers_the_error_that_it_fits(seed: int) -> None:
    problem = problem_of(seed)
    errors = [error(problem, refit_branch(problem, steps, ridge=1e-9)) for steps in (0, 1, 3, 9)]
    assert errors[0] == pytest.approx(error(problem, problem.weight))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0]


def test_what_fits_already_is_left_alone() -> None:
    problem = problem_of(3)
    fitting = replace(problem, targets=output(problem, problem.weight))
    torch.testing.assert_close(refit_branch(fitting), problem.weight, atol=1e-4, rtol=0)


def test_a_silent_gate_is_no_trouble() -> None:
    problem = problem_of(4)
    silent = replace(problem, gates=torch.zeros_like(problem.gates))
    assert torch.equal(refit_branch(silent), problem.weight)


def branch_of(checkpoint: Checkpoint, *, scale: float) -> tuple[BranchRecovery | None, float, float]:
    """The branch of block 1, whose targets are `scale` times what it gives, and its error before and now."""
    stream = BlockStream(checkpoint, 16)
    hidden = stream.embed(random_tokens(12, 16))
    family = checkpoint.family
    with stream.block(1) as block:
        linear = block.linear(family.feed_forward.output)
        inputs = projection_inputs(stream, block, family.feed_forward.output, hidden)
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        gains = torch.linspace(0.5, 1.5, inputs.shape[1])
        targets = scale * ((inputs * gains) @ weight.T)
        problem = LayerProblem(inputs, targets, weight, bias)
        held_out = 3 * 16
        before = problem.rows(len(inputs) - held_out, len(inputs)).relative_error(untuned(problem))
        found = LayerRecovery(untuned(problem), "untuned", before, before)

        def answer(posed: LayerProblem) -> LayerRecovery:
            return recover(posed, held_out, TuneMethod.lsq)

        tuned = tune_branch(
            stream, block, hidden, targets, found, answer, BranchTuning(held_out), checkpoint.storage_dtype
        )
    return tuned, before, tuned.output.error_after if tuned else before


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_gated_layer_is_recovered_from_both_ends(opened: Callable[[Recipe], Checkpoint], family: str) -> None:
    tuned, before, after = branch_of(opened(recipe(family)), scale=1.0)
    assert tuned is not None
    assert tuned.name == "mlp.up_proj"
    assert after < 0.5 * before
    assert tuned.branch.solution.weight.shape == (40, 32)


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
def test_a_layer_without_a_linear_branch_of_its_own_has_none(
    opened: Callable[[Recipe], Checkpoint], family: str
) -> None:
    tuned, _, _ = branch_of(opened(recipe(family)), scale=1.0)
    assert tuned is None
