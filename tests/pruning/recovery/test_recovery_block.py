from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from families import VARIANTS, Recipe, random_tokens, recipe
from torch import Tensor

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import cut_checkpoint, head_counts
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream, LoadedBlock
from spinecli.checkpoints.stream.observation import entering
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.decision import any_masks
from spinecli.pruning.recovery import block as fitting
from spinecli.pruning.recovery.block import Fit, FittedBlock, StudentBlock, TeacherTargets, fit_block, teach
from spinecli.pruning.recovery.gated_layer import BranchTuning
from spinecli.pruning.recovery.least_squares import LayerProblem, LayerRecovery, Solution, refit, untuned
from spinecli.pruning.recovery.moments import Moments

Opened = Callable[[Recipe], Checkpoint]
Answer = Callable[[LayerProblem], Solution]
NORMS = {
    "causal": ("self_attn_layer_norm", "final_layer_norm"),
    "encoder": ("attention.output.LayerNorm", "output.LayerNorm"),
}
ROWS, LENGTH, INDEX = 7, 8, 1
FITTING, JUDGING = torch.arange(ROWS) < 4, (torch.arange(ROWS) >= 4) & (torch.arange(ROWS) < 6)
FIT = Fit(FITTING, JUDGING)
TOKENS = random_tokens(ROWS, LENGTH)


def moved(hidden: Tensor, by: float = 0.1, seed: int = 1) -> Tensor:
    return hidden + by * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))


def doubled(problem: LayerProblem) -> Solution:
    return Solution(problem.weight * 2, problem.bias)


def ridge_alone(problem: LayerProblem) -> Solution:
    """The fit to the teacher's targets, in which the judging tokens have no say."""
    return refit(replace(problem, own=None), 0.1)


@pytest.fixture
def posed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[LayerProblem]]:
    """Let `answer` solve every problem; the problems, as they are posed."""

    def answering(answer: Answer) -> list[LayerProblem]:
        problems: list[LayerProblem] = []

        def solve(problem: LayerProblem, *_: object) -> LayerRecovery:
            problems.append(problem)
            return LayerRecovery(answer(problem), "", 0.0, 0.0)

        monkeypatch.setattr(fitting, "recover", solve)
        return problems

    return answering


@dataclass(frozen=True, eq=False)
class Walked:
    """A teacher's block on its stream, and a student's stream that has drifted from it."""

    stream: BlockStream
    hidden: Tensor
    drifted: Tensor
    targets: TeacherTargets

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokens: Tensor = TOKENS) -> Walked:
        stream = BlockStream(checkpoint, tokens.shape[1])
        hidden = stream.embed(tokens)
        with stream.block(INDEX) as block:
            targets = teach(stream, block, hidden)
        return cls(stream, hidden, moved(hidden), targets)

    @property
    def outputs(self) -> tuple[str, str]:
        return fitting.projections(self.stream.checkpoint.family)

    def fit(self, *, mask: BlockMask | None = None, shape: BlockShape | None = None, fit: Fit = FIT) -> FittedBlock:
        """Of the dense checkpoint's own block."""
        with self.stream.block(INDEX) as block:
            student = StudentBlock(block, self.drifted, mask, shape)
            return fit_block(self.stream, student, self.targets, fit, torch.float32)


@dataclass(frozen=True, eq=False)
class Uncut:
    """A block that was fitted as it is, what then entered its projections, and what it then computes."""

    found: FittedBlock
    entered: list[Tensor]
    after: Tensor


def fitted_as_it_is(walked: Walked, dtype: torch.dtype = torch.float32) -> Uncut:
    with walked.stream.block(INDEX) as block:
        found = fit_block(walked.stream, StudentBlock(block, walked.drifted), walked.targets, FIT, dtype)
        entered = [entering(block, name, walked.drifted) for name in walked.outputs if block.has(name)]
        return Uncut(found, entered, walked.stream.run(block, walked.drifted))


def given(inputs: Tensor, layer: LayerRecovery | None, like: Tensor) -> Tensor:
    assert layer is not None
    output = inputs @ layer.solution.weight.T
    return (output if layer.solution.bias is None else output + layer.solution.bias).view_as(like)


def assert_posed(problem: LayerProblem, inputs: Tensor, wanted: Tensor, reference: Tensor) -> None:
    """The sums are those of these inputs and targets, every token by 1 / mean square of the reference."""
    weights = 1 / reference.square().mean(dim=-1)
    for moments, rows in ((problem.fitting, FITTING), (problem.judging, JUDGING)):
        tokens = rows.repeat_interleave(LENGTH)
        expected = Moments.none(inputs.shape[1], wanted.shape[-1])
        expected.observe(inputs[tokens], wanted[rows].flatten(0, 1), weights[rows].flatten())
        for name in ("weight", "gram", "cross", "inputs", "targets", "square"):
            one, other = getattr(moments, name), getattr(expected, name)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)


CAUSAL = ["llama", "opt", "qwen3", "gpt2", "gpt_neox", "gpt_neox one after the other", "phi3"]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("answer", [untuned, doubled])
def test_targets_make_up_for_what_earlier_blocks_got_wrong(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], name: str, answer: Answer
) -> None:
    problems = posed(answer)
    walked = Walked.of(opened(VARIANTS[name]))
    done, targets, drifted = fitted_as_it_is(walked), walked.targets, walked.drifted
    attention, feed_forward = problems
    assert_posed(attention, done.entered[0], targets.attention_sum - drifted, targets.attention_sum)
    between = drifted + given(done.entered[0], done.found.attention, drifted)
    assert_posed(feed_forward, done.entered[1], targets.after - between, targets.after)
    torch.testing.assert_close(done.found.hidden, done.after)


@pytest.mark.parametrize("name", ["opt post-norm", "bert", "roberta masked", "narrow bert"])
@pytest.mark.parametrize("answer", [untuned, doubled])
def test_post_norm_targets_are_the_sums_before_their_norms(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], name: str, answer: Answer
) -> None:
    problems = posed(answer)
    checkpoint = opened(VARIANTS[name])
    walked = Walked.of(checkpoint)
    done, targets, drifted = fitted_as_it_is(walked), walked.targets, walked.drifted
    attention, feed_forward = problems
    prefix = checkpoint.block_prefix(INDEX)
    first, second = NORMS[checkpoint.family.kind]

    def normed(value: Tensor, norm: str) -> Tensor:
        weight, bias = (checkpoint.read(f"{prefix}{norm}.{kind}") for kind in ("weight", "bias"))
        return torch.nn.functional.layer_norm(value, value.shape[-1:], weight, bias)

    torch.testing.assert_close(normed(targets.feed_forward_sum, second), targets.after, atol=1e-4, rtol=1e-4)
    assert_posed(attention, done.entered[0], targets.attention_sum - drifted, targets.attention_sum)
    between = normed(drifted + given(done.entered[0], done.found.attention, drifted), first)
    assert_posed(feed_forward, done.entered[1], targets.feed_forward_sum - between, targets.feed_forward_sum)
    torch.testing.assert_close(done.found.hidden, done.after)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
@pytest.mark.parametrize("answer", [untuned, doubled])
def test_targets_under_output_norms_are_what_the_projections_give(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], name: str, answer: Answer
) -> None:
    problems = posed(answer)
    walked = Walked.of(opened(VARIANTS[name]))
    done = fitted_as_it_is(walked)
    seen: dict[str, Tensor] = {}
    with walked.stream.block(INDEX) as block, torch.no_grad():
        for output in walked.outputs:
            block.linear(output).register_forward_hook(lambda _, __, given, output=output: seen.update({output: given}))
        walked.stream.run(block, walked.hidden)
    for problem, entered, output in zip(problems, done.entered, walked.outputs, strict=True):
        assert_posed(problem, entered, seen[output], seen[output])
    assert not torch.equal(done.after, walked.targets.after)
    torch.testing.assert_close(done.found.hidden, done.after)


@pytest.mark.parametrize("sub_layer", ["attention", "mlp"])
def test_what_stays_learns_what_the_missing_sub_layer_added(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], sub_layer: str
) -> None:
    problems = posed(doubled)
    dense = Walked.of(opened(recipe("llama", grouped=True)))
    student = cut_with(dense, without(dense, sub_layer))
    done = fitted_as_it_is(replace(dense, stream=student))
    [problem] = problems
    assert_posed(problem, done.entered[0], dense.targets.after - dense.drifted, dense.targets.after)
    missing, left = done.found.attention, done.found.feed_forward
    if sub_layer == "mlp":
        missing, left = left, missing
    assert missing is None
    torch.testing.assert_close(done.found.hidden, dense.drifted + given(done.entered[0], left, dense.drifted))
    torch.testing.assert_close(done.found.hidden, done.after)


def without(walked: Walked, sub_layer: str) -> BlockMask:
    shape = walked.stream.checkpoint.shapes[INDEX]
    attention, mlp = sub_layer != "attention", sub_layer != "mlp"
    return BlockMask(torch.full((shape.heads,), attention), torch.full((shape.channels,), mlp))


def cut_with(walked: Walked, mask: BlockMask) -> BlockStream:
    """The stream of a checkpoint whose fitted block is cut by a mask, and others to the same shape where they must."""
    checkpoint = walked.stream.checkpoint
    after = mask.shape_after(checkpoint.shapes[INDEX])
    whole = BlockMask(torch.ones_like(mask.heads), torch.ones_like(mask.channels))
    others = list(any_masks(checkpoint.shapes, [after] * checkpoint.blocks).blocks) if after.heads else []
    others = others if others and after.channels else [whole] * checkpoint.blocks
    others[INDEX] = mask
    stream = BlockStream(cut_checkpoint(checkpoint, Masks(tuple(others))), LENGTH)
    stream.embed(TOKENS)
    return stream


def installed(block: LoadedBlock, found: FittedBlock, walked: Walked) -> None:
    """Put answers into a block as the written checkpoint has them."""
    for name, layer in found.layers(walked.stream.checkpoint.family).items():
        linear = block.linear(name)
        assert linear.weight.shape == layer.solution.weight.shape
        linear.weight.data = layer.solution.weight
        if layer.solution.bias is not None:
            linear.bias.data = layer.solution.bias


def smallest(checkpoint: Checkpoint) -> BlockShape:
    """As few heads as the format carries, and 24 of 40 channels."""
    shape = checkpoint.shape
    heads = min(head_counts(checkpoint))
    return BlockShape(heads, heads // shape.group_size, shape.head_dim, 24)


LLAMA = recipe("llama", grouped=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_units_chosen_on_the_way_are_as_many_as_asked_and_make_the_cut_checkpoint(opened: Opened, name: str) -> None:
    checkpoint = opened(VARIANTS[name])
    walked = Walked.of(checkpoint)
    wanted = smallest(checkpoint)
    found = walked.fit(shape=wanted)
    assert found.mask is not None
    assert found.mask.shape_after(checkpoint.shapes[INDEX]) == wanted
    cut = cut_with(walked, found.mask)
    with cut.block(INDEX) as block:
        installed(block, found, walked)
        torch.testing.assert_close(cut.run(block, walked.drifted), found.hidden, atol=1e-4, rtol=1e-4)
    assert (found.hidden - walked.targets.after).norm() > 1e-3


@pytest.mark.parametrize("wanted", [BlockShape(0, 0, 8, 24), BlockShape(2, 1, 8, 0)], ids=["mlp", "attention"])
def test_a_shape_may_ask_for_one_sub_layer_alone(opened: Opened, wanted: BlockShape) -> None:
    walked = Walked.of(opened(LLAMA))
    found = walked.fit(shape=wanted)
    assert (found.attention is None, found.feed_forward is None) == (not wanted.heads, not wanted.channels)
    assert found.mask is not None
    assert found.mask.shape_after(walked.stream.checkpoint.shapes[INDEX]) == wanted
    cut = cut_with(walked, found.mask)
    with cut.block(INDEX) as block:
        installed(block, found, walked)
        torch.testing.assert_close(cut.run(block, walked.drifted), found.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rounds", [1, 9], ids=["all rounds help", "the last does not"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_a_branch_is_fitted_to_the_channels_that_were_chosen(opened: Opened, name: str, rounds: int) -> None:
    walked = Walked.of(opened(VARIANTS[name]), random_tokens(400, LENGTH))
    walked = replace(walked, drifted=moved(walked.hidden, 0.01))
    rows = torch.arange(400)
    fit = Fit(rows < 320, rows >= 320, TuneMethod.lsq, branches=BranchTuning(rounds))
    plain = walked.fit(shape=smallest(walked.stream.checkpoint), fit=replace(fit, branches=None))
    found = walked.fit(shape=smallest(walked.stream.checkpoint), fit=fit)
    assert found.branch is not None
    assert found.mask is not None
    assert plain.mask is not None
    assert torch.equal(found.mask.channels, plain.mask.channels)
    assert found.feed_forward.error_after < plain.feed_forward.error_after  # type: ignore[union-attr]
    cut = cut_with(walked, found.mask)
    with cut.block(INDEX) as block:
        installed(block, found, walked)
        torch.testing.assert_close(cut.run(block, walked.drifted), found.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama biases", "opt", "gpt2", "phi3", "gemma2", "bert"])
@pytest.mark.parametrize("chosen", [True, False], ids=["shape", "mask"])
def test_a_dense_block_is_left_as_it_was_even_if_the_fit_fails(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], name: str, chosen: bool
) -> None:
    walked = Walked.of(opened(VARIANTS[name]))
    wanted = smallest(walked.stream.checkpoint)
    mask = None if chosen else any_masks(walked.stream.checkpoint.shapes, [wanted] * 3).blocks[INDEX]
    student = {"shape": wanted} if chosen else {"mask": mask}

    def failing(problem: LayerProblem) -> Solution:
        if problem.weight.shape[1] == wanted.channels:
            raise RuntimeError("no answer")
        return doubled(problem)

    for answer in (doubled, failing):
        posed(answer)
        with walked.stream.block(INDEX) as block:
            before = {name: value.clone() for name, value in block.module.state_dict().items()}
            fitted = StudentBlock(block, walked.drifted, **student)  # type: ignore[arg-type]
            if answer is failing:
                with pytest.raises(RuntimeError, match="no answer"):
                    fit_block(walked.stream, fitted, walked.targets, FIT, torch.float32)
            else:
                found = fit_block(walked.stream, fitted, walked.targets, FIT, torch.float32)
                assert not torch.equal(found.hidden, walked.stream.run(block, walked.drifted))
            after = block.module.state_dict()
            assert list(after) == list(before)
            assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_units_that_do_nothing_leave(opened: Opened) -> None:
    walked = Walked.of(opened(LLAMA))
    idle = torch.arange(0, 32, 2)
    with walked.stream.block(INDEX) as block, torch.no_grad():
        block.linear("mlp.up_proj").weight[idle] = 0
        block.linear("self_attn.v_proj").weight[:8] = 0
        targets = teach(walked.stream, block, walked.hidden)
        student = StudentBlock(block, walked.drifted, shape=BlockShape(2, 1, 8, 24))
        mask = fit_block(walked.stream, student, targets, FIT, torch.float32).mask
    assert mask is not None
    assert mask.heads.tolist() == [False, False, True, True]
    assert (~mask.channels).nonzero().flatten().tolist() == idle.tolist()


@pytest.mark.parametrize("name", ["llama grouped tied", "opt", "gpt2", "phi3", "gemma2", "bert", "narrow bert"])
def test_a_masked_block_is_fitted_as_the_one_that_is_cut_already(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], name: str
) -> None:
    posed(ridge_alone)
    walked = Walked.of(opened(VARIANTS[name]))
    wanted = smallest(walked.stream.checkpoint)
    mask = any_masks(walked.stream.checkpoint.shapes, [wanted] * 3).blocks[INDEX]
    assert_same_answers(walked, mask)


@pytest.mark.parametrize("sub_layer", ["attention", "mlp"])
def test_a_block_that_loses_a_sub_layer_is_fitted_as_the_one_without_it(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], sub_layer: str
) -> None:
    posed(ridge_alone)
    walked = Walked.of(opened(LLAMA))
    assert_same_answers(walked, without(walked, sub_layer))


def assert_same_answers(walked: Walked, mask: BlockMask) -> None:
    masked = walked.fit(mask=mask)
    assert masked.mask is not None
    assert torch.equal(masked.mask.heads, mask.heads)
    assert torch.equal(masked.mask.channels, mask.channels)
    cut = fitted_as_it_is(replace(walked, stream=cut_with(walked, mask))).found
    assert cut.mask is None
    torch.testing.assert_close(masked.hidden, cut.hidden, atol=1e-4, rtol=1e-4)
    for one, other in ((masked.attention, cut.attention), (masked.feed_forward, cut.feed_forward)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one.solution.weight, other.solution.weight, atol=1e-4, rtol=1e-3)


def test_what_all_inputs_give_is_the_second_target_of_those_that_stay(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]]
) -> None:
    problems = posed(untuned)
    walked = Walked.of(opened(VARIANTS["llama biases"]))
    mask = BlockMask(torch.tensor([True, False, True, True]), torch.arange(40) % 3 > 0)
    walked.fit(mask=mask)
    with walked.stream.block(INDEX) as block:
        for problem, name, kept in zip(
            problems, walked.outputs, (mask.heads.repeat_interleave(8), mask.channels), strict=True
        ):
            if name == walked.outputs[1]:  # what enters it depends on the heads that stay
                block.linear(walked.outputs[0]).weight.data[:, ~mask.heads.repeat_interleave(8)] = 0
            inputs, linear = entering(block, name, walked.drifted), block.linear(name)
            weights = 1 / (
                walked.targets.attention_sum if name == walked.outputs[0] else walked.targets.after
            ).square().mean(-1)
            tokens = FITTING.repeat_interleave(LENGTH)
            expected = Moments.none(int(kept.sum()), 32)
            expected.observe(inputs[tokens][:, kept], linear(inputs[tokens]).detach(), weights[FITTING].flatten())
            assert problem.own is not None
            assert torch.equal(problem.weight, linear.weight[:, kept])
            torch.testing.assert_close(problem.own.cross, expected.cross, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(problem.own.targets, expected.targets, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(problem.own.gram, expected.gram, rtol=1e-3, atol=1e-3)


def test_answers_are_rounded_before_they_are_used(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]]
) -> None:
    posed(lambda problem: Solution(problem.weight / 3, problem.bias))
    done = fitted_as_it_is(Walked.of(opened(recipe("llama"))), torch.bfloat16)
    for layer in (done.found.attention, done.found.feed_forward):
        assert layer is not None
        assert torch.equal(layer.solution.weight, layer.solution.weight.bfloat16().float())
    torch.testing.assert_close(done.found.hidden, done.after)


def with_other_rows(walked: Walked, rows: Tensor) -> Walked:
    """Other hidden states of the student and other targets of the teacher in some rows."""
    changed = {
        name: torch.where(rows[:, None, None], 3 * moved(value, 1.0, seed=5), value)
        for name, value in vars(walked.targets).items()
    }
    drifted = torch.where(rows[:, None, None], moved(walked.drifted, 1.0, seed=6), walked.drifted)
    return replace(walked, drifted=drifted, targets=TeacherTargets(**changed))


def weights(found: FittedBlock) -> list[Tensor]:
    assert found.attention is not None
    assert found.feed_forward is not None
    return [found.attention.solution.weight, found.feed_forward.solution.weight]


SHAPE = BlockShape(2, 1, 8, 24)


def test_rows_that_neither_fit_nor_judge_do_not_count(opened: Opened) -> None:
    walked = Walked.of(opened(LLAMA))
    looking_on = ~(FITTING | JUDGING)
    assert looking_on.any()
    one = walked.fit(shape=SHAPE)
    other = with_other_rows(walked, looking_on).fit(shape=SHAPE)
    for first, second in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.allclose(one.hidden[looking_on], other.hidden[looking_on])
    torch.testing.assert_close(one.hidden[~looking_on], other.hidden[~looking_on])


def test_judging_rows_choose_between_answers_and_are_not_fitted_to(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]]
) -> None:
    problems = posed(ridge_alone)
    walked = Walked.of(opened(LLAMA))
    mask = any_masks(walked.stream.checkpoint.shapes, [SHAPE] * 3).blocks[INDEX]
    one = walked.fit(mask=mask)
    other = with_other_rows(walked, JUDGING).fit(mask=mask)
    for first, second in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.allclose(problems[0].judging.cross, problems[2].judging.cross)
    third = with_other_rows(walked, FITTING).fit(mask=mask)
    assert not torch.allclose(weights(one)[0], weights(third)[0], atol=1e-3)


def test_a_token_with_huge_hidden_states_does_not_decide_alone(
    opened: Opened, posed: Callable[[Answer], list[LayerProblem]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such tokens are in every large model; what reads the stream normalises them first."""
    posed(ridge_alone)
    stream = BlockStream(opened(LLAMA), LENGTH)
    hidden = stream.embed(random_tokens(48, LENGTH))
    plain = hidden, moved(hidden, 0.1)
    huge = tuple(each.clone() for each in plain)
    for each in huge:
        each[3, 5] *= 1e3
    rows = torch.arange(48)

    def answers(hidden: Tensor, drifted: Tensor) -> list[Tensor]:
        with stream.block(INDEX) as block:
            targets = teach(stream, block, hidden)
            student = StudentBlock(block, drifted)
            return weights(fit_block(stream, student, targets, Fit(rows < 40, rows >= 40), torch.float32))

    def change() -> list[float]:
        pairs = zip(answers(*plain), answers(*huge), strict=True)
        return [float((one - other).norm() / one.norm()) for one, other in pairs]

    assert max(change()) < 0.1
    monkeypatch.setattr(fitting, "token_weights", lambda reference: torch.ones(reference.shape[:2]))
    assert max(change()) > 1, "without their weights, the one token would decide"
