"""Tuning one block: the dense teacher says what its two projections should add to the residual stream.

    x ─┬─ attention ─ o_proj ─+─ u ─┬─ feed-forward ─ down_proj ─+─ x'
       └──────────────────────┘     └─────────────────────────────┘

The student's o_proj is fitted to u_teacher - x_student, its down_proj, with the new o_proj in place, to
x'_teacher - u_student: each projection also makes up for what earlier blocks got wrong. Where a norm stands behind each
sum (post-norm), u and x' on the teacher's side are the sums before their norms; a block before a gap then learns its
own sum only, as the norm behind it is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.calibration.observation import Observer, observed, projection_inputs
from spinecli.calibration.stream import BlockStream, LoadedBlock
from spinecli.checkpoints.family import Family
from spinecli.masktuning.least_squares import LayerProblem, Solution
from spinecli.masktuning.recovery import LayerRecovery


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the teacher computed in one block; all (rows, length, d_model)."""

    attention_sum: Tensor
    """The block's input and what o_proj adds to it."""
    feed_forward_sum: Tensor
    """The feed-forward layer's residual and what down_proj adds to it."""
    after: Tensor
    """What leaves the block."""


@dataclass(frozen=True, eq=False)
class Pupil:
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

    attention: LayerRecovery
    feed_forward: LayerRecovery
    hidden: Tensor
    """(rows, length, d_model)."""


@torch.no_grad()
def teach(stream: BlockStream, block: LoadedBlock, hidden: Tensor) -> Lesson:
    """Run the teacher's block on its stream and keep its two residual sums."""
    family, post_norm = stream.checkpoint.family, stream.checkpoint.is_post_norm
    attention: list[Tensor] = []
    entering: list[Tensor] = []
    feed_forward: list[Tensor] = []
    observers: dict[str, Observer] = {family.attention.output: lambda _, outputs: attention.append(outputs)}
    if post_norm:
        observers[family.feed_forward.inputs[0]] = lambda inputs, _: entering.append(inputs)
        observers[family.feed_forward.output] = lambda _, outputs: feed_forward.append(outputs)
    with observed(block, observers):
        after = stream.run(block, hidden)
    attention_sum = hidden + torch.cat(attention).view_as(hidden)
    if not post_norm:
        return Lesson(attention_sum, after, after)
    return Lesson(attention_sum, torch.cat(entering).add_(torch.cat(feed_forward)).view_as(hidden), after)


@torch.no_grad()
def tune_block(
    stream: BlockStream,
    pupil: Pupil,
    lesson: Lesson,
    answer: Callable[[LayerProblem], LayerRecovery],
    dtype: torch.dtype,
) -> TunedBlock:
    """Tune o_proj, then down_proj with the new o_proj in place; the block's weights are changed in memory.

    Args:
        stream: the student's.
        answer: solves one projection.
        dtype: in which the weights will be stored; answers are rounded to it before they are used.
    """
    family, post_norm = stream.checkpoint.family, stream.checkpoint.is_post_norm
    hidden = pupil.hidden
    rows, length, width = hidden.shape

    def tuned(name: str, columns: Tensor | None, target: Tensor) -> tuple[LayerRecovery, Tensor]:
        inputs = projection_inputs(stream, pupil.block, name, hidden)
        problem = _problem(pupil.block, name, columns, inputs, target.flatten(0, 1))
        found = answer(problem)
        found = replace(found, solution=found.solution.rounded(dtype))
        _install(pupil.block, name, columns, found.solution)
        return found, problem.output(found.solution).view(rows, length, width)

    attention, added = tuned(family.attention.output, pupil.head_columns, lesson.attention_sum - hidden)
    if post_norm:
        entering = projection_inputs(stream, pupil.block, family.feed_forward.inputs[0], hidden)
        between, target = entering.view_as(hidden), lesson.feed_forward_sum
    else:
        between, target = hidden + added, lesson.after
    feed_forward, added = tuned(family.feed_forward.output, pupil.channel_columns, target - between)
    after = stream.run(pupil.block, hidden) if post_norm else between + added
    return TunedBlock(attention, feed_forward, after)


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


def projections(family: Family) -> tuple[str, str]:
    """The two projections that tuning changes, relative to a block."""
    return family.attention.output, family.feed_forward.output
