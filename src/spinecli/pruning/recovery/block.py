"""Tuning one block: the dense teacher says what its two projections should add to the residual stream.

    x ─┬─ attention ─ o_proj ─+─ u ─┬─ feed-forward ─ down_proj ─+─ x'
       └──────────────────────┘     └─────────────────────────────┘

The student's o_proj is fitted to u_teacher - x_student, its down_proj, with the new o_proj in place, to
x'_teacher - u_student: each projection also makes up for what earlier blocks got wrong. Where a norm stands behind each
sum (post-norm), u and x' on the teacher's side are the sums before their norms; a block before a gap then learns its
own sum only, as the norm behind it is its own. Where a norm stands on what a sub-layer gives (`Family.output_norms`),
a projection cannot set the size of what it adds: it is fitted to what the teacher's own projection gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.checkpoints.family import Family
from spinecli.checkpoints.stream.block_stream import BlockStream, LoadedBlock
from spinecli.checkpoints.stream.observation import Observer, observed, projection_inputs
from spinecli.pruning.recovery.gated_layer import BranchRecovery, BranchTuning, tune_branch
from spinecli.pruning.recovery.least_squares import LayerProblem, LayerRecovery, Solution


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """What the teacher computed in one block; all (rows, length, d_model)."""

    attention_sum: Tensor
    """The block's input and what o_proj adds to it; under an output norm, what o_proj gives."""
    feed_forward_sum: Tensor
    """The feed-forward layer's residual and what down_proj adds to it; under an output norm, what down_proj gives."""
    after: Tensor
    """What leaves the block."""


@dataclass(frozen=True, eq=False)
class StudentBlock:
    """A student's block and the stream that enters it."""

    block: LoadedBlock
    hidden: Tensor
    """(rows, length, d_model)."""
    head_columns: Tensor | None = None
    """Kept inputs of o_proj if the block is masked rather than cut."""
    channel_columns: Tensor | None = None
    """Kept inputs of down_proj if the block is masked rather than cut."""


@dataclass(frozen=True, eq=False)
class TunedBlock:
    """The answers for one block and the student's stream behind it."""

    attention: LayerRecovery | None
    """None where the block has no attention."""
    feed_forward: LayerRecovery | None
    """None where the block has no feed-forward layer."""
    hidden: Tensor
    """(rows, length, d_model)."""
    branch: BranchRecovery | None = None
    """The feed-forward layer's linear branch, where it was re-fitted, too."""

    def layers(self, family: Family) -> dict[str, LayerRecovery]:
        """Every answer by the projection's name, relative to the block."""
        answers = zip(projections(family), (self.attention, self.feed_forward), strict=True)
        found = {name: answer for name, answer in answers if answer is not None}
        return found | ({self.branch.name: self.branch.branch} if self.branch else {})


@torch.no_grad()
def teach(stream: BlockStream, block: LoadedBlock, hidden: Tensor) -> TeacherTargets:
    """Run the teacher's block on its stream and keep its two residual sums, or what stands for them."""
    family, post_norm = stream.checkpoint.family, stream.checkpoint.is_post_norm
    attention: list[Tensor] = []
    entering: list[Tensor] = []
    feed_forward: list[Tensor] = []
    observers: dict[str, Observer] = {family.attention.output: lambda _, outputs: attention.append(outputs)}
    if post_norm:
        observers[family.feed_forward.inputs[0]] = lambda inputs, _: entering.append(inputs)
    if post_norm or family.output_norms:
        observers[family.feed_forward.output] = lambda _, outputs: feed_forward.append(outputs)
    with observed(block, observers):
        after = stream.run(block, hidden)
    if not attention:
        return TeacherTargets(hidden, after, after)
    if family.output_norms:
        return TeacherTargets(torch.cat(attention).view_as(hidden), torch.cat(feed_forward).view_as(hidden), after)
    attention_sum = hidden + torch.cat(attention).view_as(hidden)
    if not post_norm:
        return TeacherTargets(attention_sum, after, after)
    return TeacherTargets(attention_sum, torch.cat(entering).add_(torch.cat(feed_forward)).view_as(hidden), after)


@torch.no_grad()
def tune_block(
    stream: BlockStream,
    student_block: StudentBlock,
    targets: TeacherTargets,
    answer: Callable[[LayerProblem], LayerRecovery],
    dtype: torch.dtype,
    branches: BranchTuning | None = None,
) -> TunedBlock:
    """Tune o_proj, then down_proj with the new o_proj in place; the block's weights are changed in memory.

    Args:
        stream: the student's.
        answer: solves one projection.
        dtype: in which the weights will be stored; answers are rounded to it before they are used.
        branches: also re-fit the feed-forward layer's linear branch, in turns with down_proj; only of cut blocks.
    """
    family, post_norm = stream.checkpoint.family, stream.checkpoint.is_post_norm
    hidden = student_block.hidden
    rows, length, width = hidden.shape

    attends, feeds = (
        student_block.block.has(name) and (columns is None or len(columns) > 0)
        for name, columns in zip(
            projections(family), (student_block.head_columns, student_block.channel_columns), strict=True
        )
    )

    def tuned(name: str, columns: Tensor | None, target: Tensor) -> tuple[LayerRecovery, Tensor]:
        inputs = projection_inputs(stream, student_block.block, name, hidden)
        problem = _problem(student_block.block, name, columns, inputs, target.flatten(0, 1))
        found = answer(problem)
        found = replace(found, solution=found.solution.rounded(dtype))
        _install(student_block.block, name, columns, found.solution)
        return found, problem.output(found.solution).view(rows, length, width)

    def tuned_feed_forward(target: Tensor) -> tuple[LayerRecovery, BranchRecovery | None, Tensor]:
        found, added = tuned(family.feed_forward.output, student_block.channel_columns, target)
        if branches is None or student_block.channel_columns is not None:
            return found, None, added
        flat = target.flatten(0, 1)
        better = tune_branch(stream, student_block.block, hidden, flat, found, answer, branches, dtype)
        if better is None:
            return found, None, added
        _install(student_block.block, better.name, None, better.branch.solution)
        _install(student_block.block, family.feed_forward.output, None, better.output.solution)
        return better.output, better, better.added.view(rows, length, width)

    if family.output_norms:
        attention, _ = tuned(family.attention.output, student_block.head_columns, targets.attention_sum)
        feed_forward, branch, _ = tuned_feed_forward(targets.feed_forward_sum)
        return TunedBlock(attention, feed_forward, stream.run(student_block.block, hidden), branch)
    if not (attends and feeds):
        for name, present in zip(projections(family), (attends, feeds), strict=True):
            if student_block.block.has(name) and not present:
                _silence(student_block.block, name)
        # what is left of the block takes over what it can of the other sub-layer's work
        if feeds:
            feed_forward, branch, added = tuned_feed_forward(targets.after - hidden)
            return TunedBlock(None, feed_forward, hidden + added, branch)
        attention, added = tuned(family.attention.output, student_block.head_columns, targets.after - hidden)
        return TunedBlock(attention, None, hidden + added)
    attention, added = tuned(family.attention.output, student_block.head_columns, targets.attention_sum - hidden)
    if post_norm:
        entering = projection_inputs(stream, student_block.block, family.feed_forward.inputs[0], hidden)
        between, target = entering.view_as(hidden), targets.feed_forward_sum
    else:
        between, target = hidden + added, targets.after
    feed_forward, branch, added = tuned_feed_forward(target - between)
    after = stream.run(student_block.block, hidden) if post_norm else between + added
    return TunedBlock(attention, feed_forward, after, branch)


def _problem(block: LoadedBlock, name: str, columns: Tensor | None, inputs: Tensor, targets: Tensor) -> LayerProblem:
    linear = block.linear(name)
    weight = linear.weight.detach().float()
    if columns is not None:
        inputs, weight = inputs[:, columns], weight[:, columns]
    bias = None if linear.bias is None else linear.bias.detach().float()
    return LayerProblem(inputs, targets, weight, bias)


def _install(block: LoadedBlock, name: str, columns: Tensor | None, solution: Solution) -> None:
    """Put a solution into the block in memory; a removed unit's columns become zero."""
    linear = block.linear(name)
    weight = solution.weight.to(linear.weight.dtype)
    if columns is not None:
        weight = torch.zeros_like(linear.weight).index_copy_(1, columns, weight)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if solution.bias is not None:
        linear.bias = torch.nn.Parameter(solution.bias.to(weight.dtype), requires_grad=False)


def _silence(block: LoadedBlock, name: str) -> None:
    """Let a projection of a block in memory add nothing."""
    linear = block.linear(name)
    linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight), requires_grad=False)
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(torch.zeros_like(linear.bias), requires_grad=False)


def projections(family: Family) -> tuple[str, str]:
    """The two projections that tuning changes, relative to a block."""
    return family.attention.output, family.feed_forward.output
