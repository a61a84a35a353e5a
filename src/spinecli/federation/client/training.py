"""A round on a device: LoRA steps on its own data, importance on the way, and cuts before them or in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from spinecli.artifacts.seeding import torch_generator
from spinecli.checkpoints.masks import Masks
from spinecli.data.batches import IGNORED, Batch, batches
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.device import (
    Device,
    PruningOrder,
    TrainingOrder,
    importance_from,
    importance_shapes,
    importance_tensors,
    mask_tensors,
)
from spinecli.federation.client.importance import SCORES, ImportanceScore
from spinecli.federation.client.local_pruning import narrowed, ramp
from spinecli.federation.client.wire import (
    FOLDED,
    adapter_from,
    adapter_tensors,
    head_from,
    head_tensors,
    outputs_from,
    outputs_tensors,
)
from spinecli.federation.messages import require_shapes
from spinecli.lora.factors import Factors

_ENDS = 4
"""The loss before and after local training are means over the first and the last quarter of its steps."""


@dataclass(frozen=True)
class Tally:
    """Sums over answers: labels of rows, or next tokens."""

    loss: float
    """Negative log-likelihood in nats."""
    correct: int
    answers: int


def answers_of(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets, one row an answer: (answers, choices) float32 and (answers,) int64."""
    inputs = {name: value.to(base.device) for name, value in batch.model_inputs().items()}
    labels = batch.labels.to(base.device)
    if base.task == "classification":
        return base.model(**inputs).logits.float(), labels
    logits = base.model(**inputs, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return logits[counted].float(), targets[counted]


def loss_of(base: BaseModel, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of a batch, with its graph."""
    logits, targets = answers_of(base, batch)
    return functional.cross_entropy(logits, targets)


@torch.no_grad()
def tally(base: BaseModel, batch: Batch) -> Tally:
    """Loss and right answers of a batch."""
    return tally_of(*answers_of(base, batch))


def tally_of(logits: Tensor, targets: Tensor) -> Tally:
    """Loss and right answers of logits (answers, choices) and targets (answers,)."""
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    return Tally(float(loss), int((logits.argmax(dim=1) == targets).sum()), len(targets))


def loss_at_ends(losses: Sequence[float]) -> tuple[float, float]:
    """The loss before and after local training, from that of every step, at least one."""
    end = max(1, len(losses) // _ENDS)
    return sum(losses[:end]) / end, sum(losses[-end:]) / end


@dataclass(frozen=True, eq=False)
class Trained:
    """What a device sends back."""

    metrics: dict[str, JsonValue]
    tensors: dict[str, Tensor]


def train(order: TrainingOrder, tensors: Mapping[str, Tensor], device: Device) -> Trained:
    """Train the factors and the head of a message on the device's own data.

    The factors arrive in the shape of the device's masks. Below the lowest block with LoRA nothing requires a gradient,
    so autograd keeps no activation there. After a cut the optimiser starts anew, since its moments have lost their
    shape (APT does the same).

    Returns factors and head after the last step, and, when pruning, the masks and the importance.
    """
    base = device.base
    device.memory.settle(order.acknowledged)
    masks = device.memory.masks(base.checkpoint.shapes)
    score = _score(order, tensors, device)
    generator = torch_generator(order.seed, "batches", device.name, order.round)
    losses: list[float] = []
    with base.lent(head_from(tensors), masks, adapter_from(tensors, FOLDED)):
        base.attach(_received(order, tensors, base), order.scale, train_a=not order.shared_a)
        steps = batches(device.data, device.indices, order.batch_size, order.steps, generator)
        cutter = _Cutter(device, order.pruning, masks, order.steps, score) if order.pruning and score else None
        if cutter and (cut := cutter.before_first_step()) is not None:
            masks = cut
        session = _Session(device, order, masks, score)
        for number, batch in enumerate(steps):
            losses.append(session.step(batch))
            if cutter and (cut := cutter.after_step(number + 1)) is not None:
                masks = cut
                session = _Session(device, order, masks, score)
        trained, head = base.attached(), base.head()
    answer = outputs_tensors(trained) if order.shared_a else adapter_tensors(trained)
    answer |= head_tensors(head)
    before, after = loss_at_ends(losses)
    metrics: dict[str, JsonValue] = {
        "examples": len(device.indices),
        "loss_before": before,
        "loss_after": after,
        "forward_seconds": device.meter.seconds("forward"),
        "backward_seconds": device.meter.seconds("backward"),
    }
    if order.pruning and score:
        device.memory.remember(order.round, masks, () if order.pruning.cut_first else score.importance)
        metrics["ratio"] = base.cuts.ratio_of(base.cuts.widths_of(masks))
        answer |= mask_tensors(masks) | importance_tensors(score.importance)
    return Trained(metrics, answer)


def _received(order: TrainingOrder, tensors: Mapping[str, Tensor], base: BaseModel) -> dict[str, Factors]:
    if not order.shared_a:
        return adapter_from(tensors)
    return outputs_from(tensors, order.seed, {name: shape[1] for name, shape in base.target_shapes().items()})


def _score(order: TrainingOrder, tensors: Mapping[str, Tensor], device: Device) -> ImportanceScore | None:
    if order.pruning is None:
        return None
    checkpoint = device.base.checkpoint
    blocks, dense = checkpoint.blocks, checkpoint.shape
    if order.pruning.cut_first:
        shapes = importance_shapes(blocks, dense)
        require_shapes({name: tensors[name] for name in shapes.keys() & tensors.keys()}, shapes)
        importance = importance_from(tensors, blocks)
    else:
        importance = device.memory.importance(blocks, dense)
    return SCORES[order.pruning.score](device.base, importance)


class _Session:
    """Local steps at one set of masks, with one optimiser."""

    def __init__(self, device: Device, order: TrainingOrder, masks: Masks, score: ImportanceScore | None) -> None:
        self._device = device
        self._order = order
        self._masks = masks
        self._score = score
        self._parameters = device.base.trainable()
        self._optimiser = torch.optim.AdamW(self._parameters, lr=order.learning_rate, weight_decay=0.0, fused=True)
        self._shapes = masks.shapes_after(device.base.checkpoint.shapes)

    def step(self, batch: Batch) -> float:
        """One step of gradient descent; returns the loss before it."""
        watching = self._score.watching() if self._score else nullcontext()
        with watching:
            loss = loss_of(self._device.base, batch)
            rows, length = batch.input_ids.shape
            cost = self._device.costs.step(self._shapes, self._order.ranks, rows, length)
            self._device.meter.charge("forward", cost.forward_flops)
            loss.backward()  # type: ignore[no-untyped-call]
        if self._score:
            self._score.after_backward(self._masks)
        nn.utils.clip_grad_norm_(self._parameters, self._order.clip_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._device.meter.charge("backward", cost.backward_flops)
        return float(loss.detach())


class _Cutter:
    """Cuts a device: once before its first step, or along the ramp, every few steps and again after the last."""

    def __init__(self, device: Device, order: PruningOrder, masks: Masks, steps: int, score: ImportanceScore) -> None:
        self._base: BaseModel = device.base
        self._order = order
        self._masks = masks
        self._steps = steps
        self._score = score
        self._cuts = device.base.cuts
        self._start = self._cuts.ratio_of(self._cuts.widths_of(masks))
        self._end = self._cuts.widths_at(order.final)
        self._may_cut = not order.collect_only and order.target > self._start

    def before_first_step(self) -> Masks | None:
        """The new masks, with the model already cut, if the order is to cut first and that takes something."""
        return self._cut_to(self._order.target) if self._may_cut and self._order.cut_first else None

    def after_step(self, number: int) -> Masks | None:
        """The same if a cut is due after local step `number`."""
        end = number == self._steps
        if not self._may_cut or self._order.cut_first or (number % self._order.interval and not end):
            return None
        return self._cut_to(self._order.target if end else ramp(number, self._steps, self._start, self._order.target))

    def _cut_to(self, ratio: float) -> Masks | None:
        now = self._cuts.widths_of(self._masks)
        widths = self._cuts.widths_at(ratio, now, self._end)
        if widths == now:
            return None
        self._masks = narrowed(self._masks, widths, self._score.importance, self._cuts.dense)
        self._base.cut(self._masks)
        return self._masks
