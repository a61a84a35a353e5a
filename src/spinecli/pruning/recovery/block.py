"""Fitting one block: the dense teacher says what its two projections should add to the residual stream.

    x ─┬─ attention ─ o_proj ─+─ u ─┬─ feed-forward ─ down_proj ─+─ x'
       └──────────────────────┘     └────────────────────────────┘

The student's o_proj is fitted to u_teacher - x_student, its down_proj, with the new o_proj in place, to
x'_teacher - u_student: each projection also makes up for what earlier blocks got wrong. Where a norm stands behind each
sum (post-norm), u and x' on the teacher's side are the sums before their norms; a block before a gap then learns its
own sum only, as the norm behind it is its own. Where a norm stands on what a sub-layer gives (`Family.output_norms`),
a projection cannot set the size of what it adds: it is fitted to what the teacher's own projection gives.

Every token weighs 1 / mean square of what the teacher has there: what reads the stream normalises it first, and a few
tokens with huge hidden states would otherwise decide alone.

If it is not known yet which units stay, but only how many, they are chosen here, by what their loss costs the student
after the others have compensated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from spinecli.checkpoints.cutting import cut_tensor, head_rows, kept_rows
from spinecli.checkpoints.family import Family
from spinecli.checkpoints.masks import BlockMask
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream, LoadedBlock
from spinecli.checkpoints.stream.observation import Observer, attention_given, attention_is_whole, entering, observed
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.elimination import eliminate
from spinecli.pruning.recovery.gated_layer import (
    BranchChunk,
    BranchRecovery,
    BranchTuning,
    branch_inputs,
    linear_branch,
    tune_branch,
)
from spinecli.pruning.recovery.least_squares import RIDGES, LayerProblem, LayerRecovery, Solution, recover, refit
from spinecli.pruning.recovery.moments import Moments


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
class Fit:
    """How projections are fitted, and to which rows."""

    fitting: Tensor
    """(rows,) bool: rows that are fitted to."""
    judging: Tensor
    """(rows,) bool: rows that choose between answers."""
    method: TuneMethod = TuneMethod.auto
    ridges: Sequence[float] = RIDGES
    branches: BranchTuning | None = None
    """Also re-fit the feed-forward layer's linear branch, in turns with down_proj."""


@dataclass(frozen=True, eq=False)
class StudentBlock:
    """A student's block and the stream that enters it."""

    block: LoadedBlock
    hidden: Tensor
    """(rows, length, d_model)."""
    mask: BlockMask | None = None
    """What is kept of the block, if it is the dense one."""
    shape: BlockShape | None = None
    """How much is to be kept of the block, if it is the dense one and `mask` is to be found."""


@dataclass(frozen=True, eq=False)
class FittedBlock:
    """The answers for one block and the student's stream behind it."""

    attention: LayerRecovery | None
    """None where the block has no attention."""
    feed_forward: LayerRecovery | None
    """None where the block has no feed-forward layer."""
    hidden: Tensor
    """(rows, length, d_model)."""
    branch: BranchRecovery | None = None
    """The feed-forward layer's linear branch, where it was re-fitted, too."""
    mask: BlockMask | None = None
    """What is kept of a block that was given as the dense one."""

    def layers(self, family: Family) -> dict[str, LayerRecovery]:
        """Every answer by the projection's name, relative to the block."""
        answers = zip(projections(family), (self.attention, self.feed_forward), strict=True)
        found = {name: answer for name, answer in answers if answer is not None}
        return found | ({self.branch.name: self.branch.branch} if self.branch else {})


def projections(family: Family) -> tuple[str, str]:
    """The two projections that are always fitted, relative to a block."""
    return family.attention.output, family.feed_forward.output


@torch.no_grad()
def teach(stream: BlockStream, block: LoadedBlock, hidden: Tensor) -> TeacherTargets:
    """Run the teacher's block on its stream and keep its two residual sums, or what stands for them."""
    family, post_norm = stream.checkpoint.family, stream.checkpoint.is_post_norm
    attention: list[Tensor] = []
    entered: list[Tensor] = []
    feed_forward: list[Tensor] = []
    observers: dict[str, Observer] = {family.attention.output: lambda _, outputs: attention.append(outputs)}
    if post_norm:
        observers[family.feed_forward.inputs[0]] = lambda inputs, _: entered.append(inputs)
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
    return TeacherTargets(attention_sum, torch.cat(entered).add_(torch.cat(feed_forward)).view_as(hidden), after)


@torch.no_grad()
def fit_block(
    stream: BlockStream, student: StudentBlock, targets: TeacherTargets, fit: Fit, dtype: torch.dtype
) -> FittedBlock:
    """Fit o_proj, then down_proj with the new o_proj in place; a block given as the dense one is left as it was.

    Args:
        stream: the student's.
        dtype: in which the weights will be stored; answers are rounded to it before they are used.
    """
    if student.mask is None and student.shape is None:
        return _Fitting(stream, student, targets, fit, dtype).fitted()
    with weights_kept(student.block, stream.checkpoint.family):
        return _Fitting(stream, student, targets, fit, dtype).fitted()


@contextmanager
def weights_kept(block: LoadedBlock, family: Family) -> Iterator[None]:
    """Put the weights of a block's projections back when the context ends."""
    linears = [block.linear(name) for name in family.projections if block.has(name)]
    originals = [(linear.weight, linear.bias) for linear in linears]
    try:
        yield
    finally:
        for linear, (weight, bias) in zip(linears, originals, strict=True):
            linear.weight, linear.bias = weight, bias


_Chunk = tuple[Tensor, Tensor]
"""What enters a projection and what should leave it, of one chunk of rows: (tokens, d_in), (rows, length, d_model)."""

# What enters projections is kept for so many bytes of a block's rows, and computed again for the others.
_KEPT_BYTES = 256 << 20


class _Kept:
    """What entered the projections, by name and first row."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], Tensor] = {}
        self._bytes = 0

    def get(self, name: str, rows: slice) -> Tensor | None:
        return self._found.get((name, rows.start))

    def put(self, name: str, rows: slice, value: Tensor) -> None:
        if self._bytes + value.nbytes <= _KEPT_BYTES:
            self._found[name, rows.start] = value
            self._bytes += value.nbytes

    def forget(self, name: str) -> None:
        self.change(name, lambda value: None)

    def change(self, name: str, how: Callable[[Tensor], Tensor | None]) -> None:
        for key in [key for key in self._found if key[0] == name]:
            before = self._found.pop(key)
            after = how(before)
            self._bytes += (0 if after is None else after.nbytes) - before.nbytes
            if after is not None:
                self._found[key] = after


class _Fitting:
    """One block being fitted."""

    def __init__(
        self, stream: BlockStream, student: StudentBlock, targets: TeacherTargets, fit: Fit, dtype: torch.dtype
    ) -> None:
        self.stream, self.student, self.targets, self.fit, self.dtype = stream, student, targets, fit, dtype
        self.block, self.hidden = student.block, student.hidden
        self.family = stream.checkpoint.family
        self.full = stream.checkpoint.shapes[student.block.index]
        self.heads, self.channels = _kept_units(student, self.full)
        self.output, self.closing = projections(self.family)
        self.summed = not (stream.checkpoint.is_post_norm or self.family.output_norms)
        """Whether what leaves the block is what enters it and what its two projections add."""
        self.kept = _Kept()

    def fitted(self) -> FittedBlock:
        """The answers, and the stream behind them."""
        attention = feed_forward = None
        branch: BranchRecovery | None = None
        if self.attends:
            attention = self._attention()
        elif self.block.has(self.output):
            self._silence(self.output)
        if self.feeds:
            feed_forward, branch = self._feed_forward()
        elif self.block.has(self.closing):
            self._silence(self.closing)
        mask = None
        if self.heads is not None and self.channels is not None:
            mask = BlockMask(self.heads, self.channels)
        return FittedBlock(attention, feed_forward, self._behind(), branch, mask)

    @property
    def attends(self) -> bool:
        """Whether anything of the attention stays."""
        wanted = self.student.shape.heads if self.student.shape else self.heads is None or bool(self.heads.any())
        return self.block.has(self.output) and bool(wanted)

    @property
    def feeds(self) -> bool:
        """Whether anything of the feed-forward layer stays."""
        wanted = self.student.shape.channels if self.student.shape else self.channels is None or self.channels.any()
        return self.block.has(self.closing) and bool(wanted)

    def _attention(self) -> LayerRecovery:
        targets = self.targets
        reference = targets.attention_sum if self.family.output_norms or self.feeds else targets.after

        def posed(rows: slice) -> _Chunk:
            chunk = self.hidden[rows]
            found = entering(self.block, self.output, chunk)
            self.kept.put(self.output, rows, found)
            return found, reference[rows] if self.family.output_norms else reference[rows] - chunk

        problem = self._problem(self.output, posed, reference)
        if self.student.shape:
            width = self.full.group_size * self.full.head_dim
            groups = _chosen(problem, width, self.student.shape.kv_heads)
            self.heads = groups.repeat_interleave(self.full.group_size)
        columns = None if self.heads is None else head_rows(self.heads, self.full.head_dim).to(self.hidden.device)
        answer = self._solved(self.output, problem, columns)
        # from here on it counts what the attention adds, not what its projection sees
        self.kept.change(self.output, lambda inputs: self._projected(self.output, inputs) if self.summed else None)
        return answer

    def _feed_forward(self) -> tuple[LayerRecovery, BranchRecovery | None]:
        targets = self.targets
        alone = self.family.output_norms or (self.attends and self.stream.checkpoint.is_post_norm)
        reference = targets.feed_forward_sum if alone else targets.after

        def posed(rows: slice) -> _Chunk:
            found, between = self._entering_feed_forward(rows)
            return found, reference[rows] if self.family.output_norms else reference[rows] - between

        problem = self._problem(self.closing, posed, reference)
        if self.student.shape:
            self.channels = _chosen(problem, 1, self.student.shape.channels)
        columns = None if self.channels is None else self.channels.nonzero().flatten().to(self.hidden.device)
        answer = self._solved(self.closing, problem, columns)
        del problem
        if columns is not None:
            self._narrow(columns, answer.solution)
        if self.fit.branches is None or (branch := linear_branch(self.family)) is None:
            return answer, None

        tried: list[LayerRecovery] = []

        def again() -> LayerRecovery:
            self.kept.forget(self.closing)
            tried.append(self._solved(self.closing, self._problem(self.closing, posed, reference), None))
            return tried[-1]

        chunks = self._to_fit_to(branch, posed, reference)
        better = tune_branch(self.block, branch, self.closing, chunks, answer, again, self.fit.branches, self.dtype)
        if better is None or better.output.solution is not tried[-1].solution:
            self.kept.forget(self.closing)  # it was seen behind weights that have been put back
        return (better.output, better) if better else (answer, None)

    def _to_fit_to(self, branch: str, posed: Callable[[slice], _Chunk], reference: Tensor) -> Iterator[BranchChunk]:
        """The rows to fit to, a chunk at a time."""
        for rows in self.stream.chunks(self.hidden):
            chosen = self.fit.fitting[rows].to(self.hidden.device)
            if not bool(chosen.any()):
                continue
            seen, wanted = posed(rows)
            with self._attention_given(rows):
                inputs, gates = branch_inputs(self.block, branch, self.closing, self.hidden[rows])
            tokens = chosen.repeat_interleave(wanted.shape[1])
            weights = token_weights(reference[rows]).flatten()
            yield BranchChunk(
                inputs[tokens], gates[tokens], seen[tokens], wanted.flatten(0, 1)[tokens], weights[tokens]
            )

    def _entering_feed_forward(self, rows: slice) -> _Chunk:
        """What enters the feed-forward output projection, and the residual that its output is added to."""
        chunk = self.hidden[rows]
        added = self._added(self.output, rows)
        found = self.kept.get(self.closing, rows)
        if added is not None:
            if found is None:
                with self._attention_given(rows):
                    found = entering(self.block, self.closing, chunk)
                self.kept.put(self.closing, rows, found)
            return found, chunk + added
        between: list[Tensor] = []
        observers: dict[str, Observer] = {}
        if self.attends and self.stream.checkpoint.is_post_norm:
            observers[self.family.feed_forward.inputs[0]] = lambda inputs, _: between.append(inputs.view_as(chunk))
        elif self.attends:
            observers[self.output] = lambda _, outputs: between.append(chunk + outputs.view_as(chunk))
        elif found is not None:
            return found, chunk
        found = entering(self.block, self.closing, chunk, observers)
        self.kept.put(self.closing, rows, found)
        return found, between[0] if between else chunk

    def _added(self, name: str, rows: slice) -> Tensor | None:
        """What a fitted projection adds to the stream, (rows, length, d_model); None if its inputs were not kept."""
        inputs = self.kept.get(name, rows) if self.summed else None
        if inputs is None:
            return None
        return (inputs if name == self.output else self._projected(name, inputs)).view_as(self.hidden[rows])

    def _projected(self, name: str, inputs: Tensor) -> Tensor:
        """(tokens, d_in) -> (tokens, d_model), by the projection in memory."""
        linear = self.block.linear(name)
        output = inputs @ linear.weight.float().T
        return output if linear.bias is None else output + linear.bias.float()

    @contextmanager
    def _attention_given(self, rows: slice) -> Iterator[None]:
        """Do not compute the attention of these rows again if what it adds is known."""
        added = self._added(self.output, rows) if self.attends else None
        if added is None or not self._separable:
            yield
            return
        with attention_given(self.block, self.output, added):
            yield

    @cached_property
    def _separable(self) -> bool:
        """Whether the feed-forward layer can be run without the attention."""
        return attention_is_whole(self.block, self.output, self.hidden[:1])

    def _behind(self) -> Tensor:
        """What leaves the block: (rows, length, d_model)."""
        present = [name for name, there in ((self.output, self.attends), (self.closing, self.feeds)) if there]
        after = torch.empty_like(self.hidden)
        for rows in self.stream.chunks(self.hidden):
            known = [self._added(name, rows) for name in present]
            if self.summed and all(each is not None for each in known):
                after[rows] = sum((each for each in known if each is not None), start=self.hidden[rows])
            else:
                with self._attention_given(rows):
                    after[rows] = self.block(self.hidden[rows])
        return after

    def _problem(self, name: str, posed: Callable[[slice], _Chunk], reference: Tensor) -> LayerProblem:
        """The sums over all rows."""
        linear = self.block.linear(name)
        weight, bias = linear.weight.detach().float(), None if linear.bias is None else linear.bias.detach().float()
        d, k = weight.shape
        fitting, judging = (Moments.none(k, d, weight.device) for _ in range(2))
        for rows in self.stream.chunks(self.hidden):
            if not bool((self.fit.fitting[rows] | self.fit.judging[rows]).any()):
                continue
            inputs, wanted = posed(rows)
            weights = token_weights(reference[rows]).flatten()
            for moments, chosen in ((fitting, self.fit.fitting[rows]), (judging, self.fit.judging[rows])):
                if bool(chosen.any()):
                    tokens = chosen.to(weights.device).repeat_interleave(wanted.shape[1])
                    moments.observe(inputs[tokens], wanted.flatten(0, 1)[tokens], weights[tokens])
        return LayerProblem(fitting, judging, weight, bias)

    def _solved(self, name: str, problem: LayerProblem, columns: Tensor | None) -> LayerRecovery:
        """Fit a projection's kept inputs and put the answer in its place."""
        if columns is not None:
            problem = _narrowed(problem, columns)
        found = recover(problem, self.fit.method, self.fit.ridges)
        found = replace(found, solution=found.solution.rounded(self.dtype))
        self._install(name, columns, found.solution)
        return found

    def _install(self, name: str, columns: Tensor | None, solution: Solution) -> None:
        """Put a solution into the block in memory; a removed unit's columns become zero."""
        linear = self.block.linear(name)
        weight = solution.weight.to(linear.weight.dtype)
        if columns is not None:
            weight = torch.zeros_like(linear.weight).index_copy_(1, columns, weight)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if solution.bias is not None:
            linear.bias = nn.Parameter(solution.bias.to(weight.dtype), requires_grad=False)

    def _silence(self, name: str) -> None:
        """Let a projection add nothing."""
        linear = self.block.linear(name)
        linear.weight = nn.Parameter(torch.zeros_like(linear.weight), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.bias), requires_grad=False)

    def _narrow(self, columns: Tensor, solution: Solution) -> None:
        """Leave the removed channels out of the feed-forward layer, which spares computing them."""
        assert self.channels is not None
        self.kept.change(self.closing, lambda inputs: inputs[:, columns])
        every = torch.ones(self.full.heads, dtype=torch.bool)
        rows = kept_rows(self.family, BlockMask(every, self.channels), self.full)
        for name in dict.fromkeys(self.family.feed_forward.inputs):
            linear = self.block.linear(name)
            for kind in ("weight", "bias"):
                value = getattr(linear, kind)
                if value is not None:
                    cut = cut_tensor(f"{name}.{kind}", value.detach(), _on(value.device, rows))
                    setattr(linear, kind, nn.Parameter(cut, requires_grad=False))
        self._install(self.closing, None, solution)


def token_weights(reference: Tensor) -> Tensor:
    """1 / mean square of every token's hidden states: (rows, length, d_model) -> (rows, length)."""
    return 1 / reference.float().square().mean(dim=-1).clamp_min(1e-12)


def _kept_units(student: StudentBlock, full: BlockShape) -> tuple[Tensor | None, Tensor | None]:
    """(heads,) and (channels,) bool as far as they are known; None for a block that is cut already."""
    if student.mask is not None:
        return student.mask.heads, student.mask.channels
    if student.shape is None:
        return None, None
    return torch.zeros(full.heads, dtype=torch.bool), torch.zeros(full.channels, dtype=torch.bool)


_CHOOSING_RIDGE = 0.03


def _chosen(problem: LayerProblem, unit_size: int, count: int) -> Tensor:
    """Which units stay: (units,) bool with `count` True."""
    units = problem.weight.shape[1] // unit_size
    if count >= units:
        return torch.ones(units, dtype=torch.bool)
    start = refit(_narrowed(problem, None), _CHOOSING_RIDGE)
    order = eliminate(start.weight, problem.fitting.gram.cpu().clone(), unit_size, stay=count).order
    return order >= units - count


def _narrowed(problem: LayerProblem, columns: Tensor | None) -> LayerProblem:
    """The problem of a projection that keeps some of its inputs, with what all of them give as a second target."""
    own = problem.fitting.given(problem.weight, problem.bias)
    if columns is None:
        return replace(problem, own=own)
    fitting = problem.fitting.columns(columns)
    return LayerProblem(
        fitting,
        problem.judging.columns(columns),
        problem.weight[:, columns],
        problem.bias,
        replace(fitting, cross=own.cross[columns], targets=own.targets),
    )


def _on(device: torch.device, rows: Mapping[str, tuple[int, Tensor]]) -> dict[str, tuple[int, Tensor]]:
    return {name: (axis, kept.to(device)) for name, (axis, kept) in rows.items()}
