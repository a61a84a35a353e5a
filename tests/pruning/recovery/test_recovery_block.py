from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import VARIANTS, Recipe, random_tokens, recipe
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.pruning.recovery.block import StudentBlock, TeacherTargets, TunedBlock, teach, tune_block
from spinecli.pruning.recovery.least_squares import LayerProblem, LayerRecovery, Solution, untuned

Opened = Callable[[Recipe], Checkpoint]
Answer = Callable[[LayerProblem], Solution]
NORMS = {
    "causal": ("self_attn_layer_norm", "final_layer_norm"),
    "encoder": ("attention.output.LayerNorm", "output.LayerNorm"),
}


def tuned(
    opened: Opened, made: Recipe, answer: Answer, dtype: torch.dtype = torch.float32, columns: Tensor | None = None
) -> tuple[TeacherTargets, Tensor, list[LayerProblem], TunedBlock, Tensor]:
    """Targets, student stream, the two problems posed, the tuned block, and what the block then computes itself."""
    stream = BlockStream(opened(made), 8)
    hidden = stream.embed(random_tokens(3, 8))
    drifted = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    posed: list[LayerProblem] = []

    def solve(problem: LayerProblem) -> LayerRecovery:
        posed.append(problem)
        return LayerRecovery(answer(problem), "", 0.0, 0.0)

    with stream.block(1) as block:
        targets = teach(stream, block, hidden)
        found = tune_block(stream, StudentBlock(block, drifted, columns, columns), targets, solve, dtype)
        after = stream.run(block, drifted)
    return targets, drifted, posed, found, after


def doubled(problem: LayerProblem) -> Solution:
    return Solution(problem.weight * 2, problem.bias)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("answer", [untuned, doubled])
def test_targets_make_up_for_what_earlier_blocks_got_wrong(opened: Opened, name: str, answer: Answer) -> None:
    targets, drifted, [attention, feed_forward], found, after = tuned(opened, VARIANTS[name], answer)
    torch.testing.assert_close(attention.targets, (targets.attention_sum - drifted).flatten(0, 1))
    between = drifted + attention.output(found.attention.solution).view_as(drifted)
    torch.testing.assert_close(feed_forward.targets, (targets.after - between).flatten(0, 1))
    torch.testing.assert_close(found.hidden, after)


@pytest.mark.parametrize("name", ["opt post-norm", "bert", "roberta masked", "narrow bert"])
@pytest.mark.parametrize("answer", [untuned, doubled])
def test_post_norm_targets_are_the_sums_before_their_norms(opened: Opened, name: str, answer: Answer) -> None:
    targets, drifted, [attention, feed_forward], found, after = tuned(opened, VARIANTS[name], answer)
    checkpoint = opened(VARIANTS[name])
    prefix = checkpoint.block_prefix(1)
    first, second = NORMS[checkpoint.family.kind]

    def normed(value: Tensor, norm: str) -> Tensor:
        weight, bias = (checkpoint.read(f"{prefix}{norm}.{kind}") for kind in ("weight", "bias"))
        return torch.nn.functional.layer_norm(value, value.shape[-1:], weight, bias)

    torch.testing.assert_close(normed(targets.feed_forward_sum, second), targets.after, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(attention.targets, (targets.attention_sum - drifted).flatten(0, 1))
    between = normed(drifted + attention.output(found.attention.solution).view_as(drifted), first)
    wanted = (targets.feed_forward_sum - between).flatten(0, 1)
    torch.testing.assert_close(feed_forward.targets, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.hidden, after)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
@pytest.mark.parametrize("answer", [untuned, doubled])
def test_targets_under_output_norms_are_what_the_projections_give(opened: Opened, name: str, answer: Answer) -> None:
    targets, _, posed, found, after = tuned(opened, VARIANTS[name], answer)
    stream = BlockStream(opened(VARIANTS[name]), 8)
    hidden = stream.embed(random_tokens(3, 8))
    seen: dict[str, Tensor] = {}
    with stream.block(1) as block, torch.no_grad():
        for output in ("self_attn.o_proj", "mlp.down_proj"):
            block.linear(output).register_forward_hook(lambda _, __, given, output=output: seen.update({output: given}))
        stream.run(block, hidden)
    for problem, given in zip(posed, seen.values(), strict=True):
        torch.testing.assert_close(problem.targets, given.flatten(0, 1))
    assert not torch.equal(after, targets.after)
    torch.testing.assert_close(found.hidden, after)


def test_answers_are_rounded_before_they_are_used(opened: Opened) -> None:
    third = lambda problem: Solution(problem.weight / 3, problem.bias)  # noqa: E731
    _, _, _, found, after = tuned(opened, recipe("llama"), third, torch.bfloat16)
    for layer in (found.attention, found.feed_forward):
        assert torch.equal(layer.solution.weight, layer.solution.weight.bfloat16().float())
    torch.testing.assert_close(found.hidden, after)


def test_a_masked_block_is_tuned_on_its_kept_columns(opened: Opened) -> None:
    columns = torch.tensor([0, 3, 5, 20])
    _, _, [attention, feed_forward], found, after = tuned(opened, recipe("llama"), doubled, columns=columns)
    assert attention.inputs.shape == feed_forward.inputs.shape == (24, 4)
    assert found.feed_forward.solution.weight.shape == (32, 4)
    torch.testing.assert_close(found.hidden, after)
