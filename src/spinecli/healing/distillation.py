"""The training loop: steps, the judgement of held-out rows in between, and the state that a resumed run goes on from.

Rows are trained on in a new order each epoch. The learning rate rises over the first steps and then falls along a
cosine. Every few steps the held-out rows are judged, and the parameters that were best on them are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.seeding import torch_generator
from spinecli.data.rows import TokenRows
from spinecli.errors import TrainingError
from spinecli.healing.config import DistillConfig, Loss
from spinecli.healing.curve import Judged
from spinecli.healing.loss import Sums, loss_sums
from spinecli.healing.processes import Processes
from spinecli.healing.student import Student
from spinecli.healing.targets import TargetCache, Targets

PHASE = "healing"
JUDGEMENTS = 8
"""How often the held-out rows are judged after the first step."""
_WARMUP = 0.05
_CLIP_NORM = 1.0
# Tokens that pass through the student together: bounds what autograd keeps.
TOKENS_TOGETHER = 1024


@dataclass(frozen=True, eq=False)
class Lesson:
    """The rows, and what the teacher says of them."""

    rows: TokenRows
    held_out: int
    """The last rows, which are never trained on."""
    targets: TargetCache | None
    """None if nothing is compared with the teacher."""

    @property
    def trained_on(self) -> int:
        """Number of the first rows."""
        return self.rows.rows - self.held_out

    def positions(self, numbers: Tensor) -> tuple[Tensor, Tensor, Targets | None]:
        """Of rows (rows,): tokens (rows, length), which of them are predicted, and the teacher's answers there."""
        tokens, wanted = self.rows.tokens[numbers], self.rows.targets[numbers]
        if self.targets is None:
            return tokens, wanted, None
        likely, found = self.targets.read(numbers)
        return tokens, wanted, Targets(likely[wanted[:, 1:]], found[wanted[:, 1:]])


class Distillation:
    """A student on its way.

    Args:
        tokens: to train on in all.
        processes: that train it together, each with its share of the rows of a step.
    """

    def __init__(
        self,
        student: Student,
        lesson: Lesson,
        config: DistillConfig,
        tokens: int,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self._student, self._lesson, self._config, self._seed = student, lesson, config, seed
        self._processes = processes or Processes()
        self.rows = min(config.batch_size, lesson.trained_on)
        """In a step."""
        self.steps = steps_for(tokens, self.rows, lesson.rows.length)
        parameters = list(student.trained.values())
        self._optimizer = torch.optim.AdamW(parameters, lr=config.peak_learning_rate, weight_decay=0.0, fused=True)
        self.curve: list[Judged] = []
        self._best: dict[str, Tensor] = {}
        self._losses: list[float] = []

    def run(self, context: RunContext) -> None:
        """All steps that are left; the student then has the parameters that were best on the held-out rows.

        Raises: TrainingError if the loss is no number any more.
        """
        journal = context.journal(PHASE)
        done = 0
        if journal and (saved := journal.load()):
            self._restore(done := saved.finished, saved.tensors)
        else:
            self._judge(0)
        self._processes.wait()
        moments = {round(self.steps * (number + 1) / JUDGEMENTS) for number in range(JUDGEMENTS)}
        order = self._order(done)
        for step in range(done + 1, self.steps + 1):
            self._step(step, next(order))
            if step in moments:
                self._judge(step)
            if journal and self._processes.leads:
                journal.save(step, self._state(), last=step == self.steps)
            context.progress(PHASE, step, self.steps)
        for name, value in self._best.items():
            self._student.trained[name].data.copy_(value)

    def judge(self) -> Sums:
        """The losses of the student on the held-out rows."""
        held_out = torch.arange(self._lesson.trained_on, self._lesson.rows.rows)
        return self._shared_losses(held_out)

    @property
    def _together(self) -> int:
        return max(1, TOKENS_TOGETHER // self._lesson.rows.length)

    def _order(self, done: int) -> Iterator[Tensor]:
        """The rows of each step from step `done` on."""
        count = self._lesson.trained_on
        epoch, waiting = 0, torch.empty(0, dtype=torch.int64)
        for step in range(self.steps):
            while len(waiting) < self.rows:
                shuffled = torch.randperm(count, generator=torch_generator(self._seed, "order of rows", epoch))
                waiting, epoch = torch.cat([waiting, shuffled]), epoch + 1
            if step >= done:
                yield waiting[: self.rows]
            waiting = waiting[self.rows :]

    def _step(self, step: int, numbers: Tensor) -> None:
        positions = int(self._lesson.rows.targets[numbers].sum())
        loss = self._shared_losses(numbers, scale=1 / max(1, positions)).of(self._config.loss)
        self._add_gradients()
        norm = float(nn.utils.clip_grad_norm_(self._student.trained.values(), _CLIP_NORM))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"The loss is no number any more in step {step} of {self.steps}; lower --learning-rate, or use "
                "--dtype float32."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.peak_learning_rate * share_of_peak(step, self.steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss)

    def _shared_losses(self, numbers: Tensor, scale: float | None = None) -> Sums:
        """Of rows (rows,), of which each process takes its share."""
        total = Sums(0.0, 0.0, 0)
        if len(own := self._processes.share(numbers)):
            for part in torch.split(own, self._together):
                total += self._losses_of(part, scale)
        return total.over(self._processes)

    def _add_gradients(self) -> None:
        """Give every process the gradients of all of them."""
        if self._processes.count == 1:
            return
        trained = self._student.trained.values()
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
        summed = self._processes.total(torch.cat([each.flatten() for each in found]))
        for parameter, gradient in zip(trained, torch.split(summed, [each.numel() for each in found]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _losses_of(self, numbers: Tensor, scale: float | None = None) -> Sums:
        student, config = self._student, self._config
        tokens, wanted, targets = self._lesson.positions(numbers)
        device = student.model.device
        with torch.set_grad_enabled(scale is not None):
            hidden = student.hidden(tokens)[:, :-1][wanted[:, 1:].to(device)]
        if targets is not None:
            targets = Targets(targets.tokens.to(device), targets.log_probabilities.to(device))
        following = tokens[wanted].to(device)
        leaf = hidden.detach().requires_grad_(scale is not None)
        found = loss_sums(leaf, student, following, targets, config.loss, config.temperature, scale=scale)
        if scale is not None and leaf.grad is not None and hidden.requires_grad:
            hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return found

    def _judge(self, step: int) -> None:
        loss = self._config.loss
        found = self.judge()
        before = min((judged.held_out for judged in self.curve), default=math.inf)
        recent = sum(self._losses) / len(self._losses) if self._losses else 0.0
        self.curve.append(
            Judged(
                step=step,
                tokens=step * self.rows * self._lesson.rows.length,
                held_out=found.of(loss),
                held_out_lm=found.of(Loss.lm),
                training=recent,
            )
        )
        self._losses = []
        if self.curve[-1].held_out < before:
            self._best = {name: value.detach().clone() for name, value in self._student.trained.items()}

    def _state(self) -> dict[str, Tensor]:
        state = {f"now.{name}": value.detach() for name, value in self._student.trained.items()}
        state |= {f"best.{name}": value for name, value in self._best.items()}
        for name, parameter in self._student.trained.items():
            for key, value in self._optimizer.state[parameter].items():
                state[f"{key}.{name}"] = value
        rows = [list(each.model_dump().values()) for each in self.curve]
        losses = torch.tensor(self._losses, dtype=torch.float64)
        return state | {"curve": torch.tensor(rows, dtype=torch.float64), "losses": losses}

    def _restore(self, done: int, saved: dict[str, Tensor]) -> None:
        device = self._student.model.device
        for name, parameter in self._student.trained.items():
            parameter.data.copy_(saved[f"now.{name}"])
            self._best[name] = saved[f"best.{name}"].to(device)
            keys = ("step", "exp_avg", "exp_avg_sq")
            self._optimizer.state[parameter] = {
                key: saved[f"{key}.{name}"].to("cpu" if key == "step" and device.type == "cpu" else device)
                for key in keys
            }
        for values in saved["curve"].tolist():
            self.curve.append(Judged.model_validate(dict(zip(Judged.model_fields, values, strict=True))))
        self._losses = saved["losses"].tolist()


def steps_for(tokens: int, rows: int, length: int) -> int:
    """How many steps of `rows` rows train on so many tokens."""
    return max(1, round(tokens / (rows * length)))


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 1, as a share of the largest: a line up, then half a cosine down."""
    warmup = math.ceil(_WARMUP * steps)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
