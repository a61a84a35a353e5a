from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from families import Recipe, random_tokens, recipe
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream, LoadedBlock
from spinecli.checkpoints.stream.observation import entering
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery import gated_layer
from spinecli.pruning.recovery.gated_layer import (
    BranchChunk,
    BranchProblem,
    BranchRecovery,
    BranchTuning,
    branch_inputs,
    linear_branch,
    refit_branch,
    tune_branch,
)
from spinecli.pruning.recovery.least_squares import LayerProblem, LayerRecovery, recover, untuned
from spinecli.pruning.recovery.moments import Moments

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
    )


def output(problem: BranchProblem, weight: Tensor) -> Tensor:
    hidden = problem.inputs @ weight.T
    if problem.bias is not None:
        hidden = hidden + problem.bias
    return (problem.gates * hidden) @ problem.output_weight.T


def error(problem: BranchProblem, weight: Tensor) -> float:
    return float((problem.targets - output(problem, weight)).double().square().sum())


@given(seed=st.integers(0, 9999), biased=st.booleans())
def test_with_enough_steps_it_is_the_least_squares_answer(seed: int, biased: bool) -> None:
    problem = problem_of(seed, biased=biased)
    found = refit_branch(problem, steps=400, ridge=1e-6)
    columns = torch.stack(
        [
            output(replace(problem, bias=None), one.view(CHANNELS, D_MODEL)).flatten()
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


ROWS, LENGTH, JUDGING_ROWS = 12, 16, 3
BRANCH = "mlp.up_proj"


class Layer:
    """The feed-forward layer of block 1 with targets that scales of its channels give, in a block that is loaded."""

    def __init__(self, stream: BlockStream, block: LoadedBlock, hidden: Tensor) -> None:
        self.family, self.block, self.hidden = stream.checkpoint.family, block, hidden
        self.output = self.family.feed_forward.output
        inputs = entering(block, self.output, hidden)
        linear = block.linear(self.output)
        gains = torch.linspace(0.5, 1.5, inputs.shape[1])
        self.targets = ((inputs * gains) @ linear.weight.detach().T).view_as(hidden)
        if linear.bias is not None:
            self.targets += linear.bias.detach()
        self.weights = torch.ones(hidden.shape[:2])
        self.taken = 0

    def chunks(self) -> Iterator[BranchChunk]:
        for start in range(0, ROWS - JUDGING_ROWS, 3):
            rows = slice(start, start + 3)
            self.taken += 1
            yield self.chunk(rows)

    def chunk(self, rows: slice) -> BranchChunk:
        """Rows as the branch is fitted to them."""
        inputs, gates = branch_inputs(self.block, BRANCH, self.output, self.hidden[rows])
        seen = entering(self.block, self.output, self.hidden[rows])
        return BranchChunk(inputs, gates, seen, self.targets[rows].flatten(0, 1), self.weights[rows].flatten())

    def problem(self) -> LayerProblem:
        """Of the output projection behind the branch as it is now."""
        inputs, linear = entering(self.block, self.output, self.hidden), self.block.linear(self.output)
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        fitting, judging = (Moments.none(weight.shape[1], weight.shape[0]) for _ in range(2))
        border = (ROWS - JUDGING_ROWS) * LENGTH
        targets, weights = self.targets.flatten(0, 1), self.weights.flatten()
        fitting.observe(inputs[:border], targets[:border], weights[:border])
        judging.observe(inputs[border:], targets[border:], weights[border:])
        return LayerProblem(fitting, judging, weight, bias)

    def again(self) -> LayerRecovery:
        found = recover(self.problem(), TuneMethod.lsq)
        linear = self.block.linear(self.output)
        linear.weight = torch.nn.Parameter(found.solution.weight, requires_grad=False)
        return found

    def untuned(self) -> LayerRecovery:
        problem = self.problem()
        error = problem.error(untuned(problem))
        return LayerRecovery(untuned(problem), "untuned", error, error)

    def tuned(
        self, tuning: BranchTuning | None = None, again: Callable[[], LayerRecovery] | None = None
    ) -> BranchRecovery | None:
        return tune_branch(
            self.block,
            BRANCH,
            self.output,
            self.chunks(),
            self.untuned(),
            again or self.again,
            tuning or BranchTuning(),
            torch.float32,
        )


@pytest.fixture
def layer_of(opened: Callable[[Recipe], Checkpoint]) -> Iterator[Callable[[str], Layer]]:
    with ExitStack() as stack:

        def load(family: str) -> Layer:
            stream = BlockStream(opened(recipe(family)), LENGTH)
            hidden = stream.embed(random_tokens(ROWS, LENGTH))
            return Layer(stream, stack.enter_context(stream.block(1)), hidden)

        yield load


LayerOf = Callable[[str], Layer]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_gated_layer_is_recovered_from_both_ends(layer_of: LayerOf, family: str) -> None:
    layer = layer_of(family)
    before = layer.untuned().error_before
    found = layer.tuned()
    assert found is not None
    assert found.name == "mlp.up_proj"
    assert found.output.error_before == found.branch.error_before == before
    assert found.output.error_after < 0.5 * before
    assert found.output.error_after == pytest.approx(layer.untuned().error_after), "what was found is in the block"
    assert torch.equal(layer.block.linear("mlp.up_proj").weight, found.branch.solution.weight)
    assert torch.equal(layer.block.linear(layer.output).weight, found.output.solution.weight)
    assert found.branch.solution.weight.shape == (40, 32)


def test_a_branch_that_does_not_help_is_put_back(layer_of: LayerOf) -> None:
    layer = layer_of("llama")
    before = [layer.block.linear(name).weight.clone() for name in ("mlp.up_proj", layer.output)]

    def worse() -> LayerRecovery:
        return replace(layer.again(), error_after=2.0)

    assert layer.tuned(again=worse) is None
    after = [layer.block.linear(name).weight for name in ("mlp.up_proj", layer.output)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_more_rounds_are_kept_while_they_help(layer_of: LayerOf) -> None:
    errors = [layer_of("llama").tuned(BranchTuning(rounds)).output.error_after for rounds in (1, 4)]  # type: ignore[union-attr]
    assert errors[1] < errors[0]


def test_tokens_without_weight_do_not_count_for_the_branch(layer_of: LayerOf) -> None:
    found = []
    for value in (0.0, 50.0):
        layer = layer_of("llama")
        layer.targets[2:5] += value
        layer.weights[2:5] = 0
        found.append(layer.tuned())
    one, other = found
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.branch.solution.weight, other.branch.solution.weight)


def test_a_tokens_weight_is_how_often_it_counts(layer_of: LayerOf) -> None:
    once, twice = layer_of("llama"), layer_of("llama")
    for layer in (once, twice):
        layer.targets += torch.randn(layer.targets.shape, generator=torch.Generator().manual_seed(2))
    chunk = once.chunk(slice(6))
    doubled = replace(chunk, weights=(torch.arange(6) < 2).float().add(1).repeat_interleave(LENGTH))
    repeated = [chunk, once.chunk(slice(2))]
    problems = [
        gated_layer._problem(layer.block.linear(BRANCH), layer.block.linear(layer.output), iter(chunks), 8192)
        for layer, chunks in ((once, [doubled]), (twice, repeated))
    ]
    answers = [refit_branch(problem, steps=400, ridge=1e-9) for problem in problems if problem]
    errors = [error(problems[0], answer) for answer in answers]  # type: ignore[arg-type]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[0] < 0.9 * error(problems[0], once.block.linear("mlp.up_proj").weight)  # type: ignore[arg-type]


def test_no_more_chunks_are_taken_than_there_are_tokens_to_fit_to(layer_of: LayerOf) -> None:
    for tokens, taken in ((1, 1), (3 * LENGTH, 1), (3 * LENGTH + 1, 2), (8192, 3)):
        layer = layer_of("llama")
        layer.tuned(BranchTuning(tokens=tokens))
        assert layer.taken == taken


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
def test_a_layer_without_a_linear_branch_of_its_own_has_none(layer_of: LayerOf, family: str) -> None:
    assert linear_branch(layer_of(family).family) is None


def test_a_layer_whose_second_branch_is_bent_is_left_alone(layer_of: LayerOf) -> None:
    layer = layer_of("llama")
    layer.block.linear("mlp.up_proj").register_forward_hook(lambda _, __, given: given.relu())
    before = layer.block.linear("mlp.up_proj").weight.clone()
    assert layer.tuned() is None
    assert torch.equal(layer.block.linear("mlp.up_proj").weight, before)
