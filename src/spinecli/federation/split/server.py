"""The server's half of an iteration: the top, its steps, and the gradients that go back.

Merged (MergeSFL): all features form one batch, the top takes one step on it, and device i gets its rows of the gradient
times D_S / d_i. The factor turns a slice of the gradient of the merged mean into the gradient of the device's own mean
(authors' release; docs/algorithms/mergesfl.md).

Apart (plain split federated learning): every device has a top of its own, which steps on that device's features alone;
the tops are averaged when the round is over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from spinecli.data.batches import IGNORED
from spinecli.errors import MessageError
from spinecli.federation.config import Optimizer
from spinecli.federation.messages import require_moderate
from spinecli.federation.split.messages import FeatureBatch, unpadded
from spinecli.federation.split.model import Parameters, SplitModel, optimizer_of
from spinecli.lora.aggregation.averaging import average_tensors

_MOMENT = "moment."


class UnusableFeaturesError(Exception):
    """A step would not have been along finite numbers; nothing was trained.

    Attributes:
        devices: those whose features are to blame; none where it may as well be the top.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        super().__init__(f"no finite step on the features of {', '.join(devices) or 'the devices'}")
        self.devices = list(devices)


class DivergedTopError(UnusableFeaturesError):
    """The top itself has left the finite range.

    Attributes:
        what: the numbers that show it.
        among: the devices on whose features the step was.
    """

    def __init__(self, what: str, among: Sequence[str]) -> None:
        super().__init__([])
        self.what = what
        self.among = list(among)


class Top(ABC):
    """The server's half and how it is trained.

    Args:
        start: trained tensors of the top.
        clip_norm: gradients are scaled down to this norm.
    """

    def __init__(self, model: SplitModel, start: Parameters, optimizer: Optimizer, clip_norm: float) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.trained: dict[str, Tensor] = {name: value.detach().clone() for name, value in start.items()}

    @abstractmethod
    def begin(self, learning_rate: float, devices: Sequence[str]) -> None:
        """A round with these devices begins."""

    @abstractmethod
    def step(self, batches: Mapping[str, FeatureBatch]) -> tuple[float, dict[str, Tensor]]:
        """One iteration.

        Returns: the mean loss over all answers, before the step, and for every device the gradient (tokens, d_model)
            of its own mean loss, real tokens only.

        Raises: UnusableFeaturesError if the loss or a gradient is not finite through the features of some devices; then
            no step was taken. DivergedTopError if that is so for all of them, or if the step has led to weights that
            no device could be sent.
        """

    @abstractmethod
    def computed(self, batches: Mapping[str, FeatureBatch]) -> list[tuple[int, int]]:
        """Rows and padded length of every batch that a step on these features computes."""

    @abstractmethod
    def end(self, weights: Mapping[str, float]) -> None:
        """The round is over; `weights` tells how much each device that came to its end has contributed."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that has to be kept from round to round."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""

    def _received(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the top's tensors where the model computes."""
        return {name: tensors[name].to(self.model.compute.device, copy=True) for name in self.trained}

    def _loss(self, trained: Parameters, batch: FeatureBatch) -> tuple[Tensor, Tensor]:
        """Mean loss, and the features as a leaf of its graph."""
        hidden = batch.hidden.detach().to(self.model.compute.device, self.model.compute.dtype).requires_grad_(True)
        logits, targets = self.model.answers(trained, hidden, batch.attention_mask, batch.labels)
        return functional.cross_entropy(logits, targets), hidden

    def _descend(self, trained: Parameters, optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_norm_(list(trained.values()), self.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class MergedTop(Top):
    """One top, one step on the merged batch."""

    def __init__(self, model: SplitModel, start: Parameters, optimizer: Optimizer, clip_norm: float) -> None:
        super().__init__(model, start, optimizer, clip_norm)
        self._leaves()

    def _leaves(self) -> None:
        self.trained = {name: value.requires_grad_(True) for name, value in self.trained.items()}
        self._descent = optimizer_of(self.optimizer, list(self.trained.values()), 1.0)

    def begin(self, learning_rate: float, devices: Sequence[str]) -> None:
        """The optimizer goes on from the round before, at this round's rate."""
        for group in self._descent.param_groups:
            group["lr"] = learning_rate

    def step(self, batches: Mapping[str, FeatureBatch]) -> tuple[float, dict[str, Tensor]]:
        """One step on all features together."""
        parts = list(batches.values())
        merged = merged_batch(parts)
        loss, hidden = self._loss(self.trained, merged)
        loss.backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        slices = torch.split(hidden.grad, [part.rows for part in parts])
        masks = torch.split(merged.attention_mask, [part.rows for part in parts])
        gradients = {
            device: unpadded(gradient, mask) * (merged.answers / part.answers)
            for device, part, gradient, mask in zip(batches, parts, slices, masks, strict=True)
        }
        _require_usable([loss], [self.trained], gradients)
        self._descend(self.trained, self._descent)
        _require_moderate(self.trained, list(batches))
        return float(loss.detach()), gradients

    def computed(self, batches: Mapping[str, FeatureBatch]) -> list[tuple[int, int]]:
        """One batch with all rows."""
        parts = batches.values()
        return [(sum(part.rows for part in parts), max(part.length for part in parts))]

    def end(self, weights: Mapping[str, float]) -> None:
        """The top is what it is."""

    def tensors(self) -> dict[str, Tensor]:
        """The top, and what the optimizer remembers of each tensor; copies, since both change in place."""
        kept = {name: value.detach().clone() for name, value in self.trained.items()}
        for name, value in self.trained.items():
            state = self._descent.state.get(value, {})
            kept |= {f"{_MOMENT}{key}.{name}": moment.clone() for key, moment in state.items()}
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was kept."""
        self.trained = self._received(tensors)
        self._leaves()
        for name, value in self.trained.items():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (kept := tensors.get(f"{_MOMENT}{key}.{name}")) is not None:
                    state[key] = kept.clone() if key == "step" else kept.to(value.device, copy=True)
            if state:
                self._descent.state[value] = state


class TopsApart(Top):
    """One top for each device of the round."""

    def begin(self, learning_rate: float, devices: Sequence[str]) -> None:
        """Every device's top starts from the common one, with an optimizer of its own."""
        self._tops = {
            device: {name: value.clone().requires_grad_(True) for name, value in self.trained.items()}
            for device in devices
        }
        self._descents = {
            device: optimizer_of(self.optimizer, list(top.values()), learning_rate)
            for device, top in self._tops.items()
        }

    def step(self, batches: Mapping[str, FeatureBatch]) -> tuple[float, dict[str, Tensor]]:
        """One step of every top on its own device's features."""
        losses, gradients = {}, {}
        for device, batch in batches.items():
            losses[device], hidden = self._loss(self._tops[device], batch)
            losses[device].backward()  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            gradients[device] = unpadded(hidden.grad, batch.attention_mask)
        _require_usable(list(losses.values()), [self._tops[device] for device in batches], gradients)
        for device in batches:
            self._descend(self._tops[device], self._descents[device])
            _require_moderate(self._tops[device], [device])
        answers = sum(batch.answers for batch in batches.values())
        return sum(
            float(losses[device].detach()) * batch.answers for device, batch in batches.items()
        ) / answers, gradients

    def computed(self, batches: Mapping[str, FeatureBatch]) -> list[tuple[int, int]]:
        """Each device's own."""
        return [(part.rows, part.length) for part in batches.values()]

    def end(self, weights: Mapping[str, float]) -> None:
        """The common top is the weighted mean; with nobody left it stays what it was."""
        if weights:
            tops = [{name: value.detach() for name, value in self._tops[device].items()} for device in weights]
            self.trained = average_tensors(tops, list(weights.values()))
        self._tops, self._descents = {}, {}

    def tensors(self) -> dict[str, Tensor]:
        """The common top."""
        return dict(self.trained)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was kept."""
        self.trained = self._received(tensors)


def merged_batch(parts: Sequence[FeatureBatch]) -> FeatureBatch:
    """One mixed sequence of features: rows one below the other, padded to the longest of all."""
    length = max(part.length for part in parts)

    def widened(value: Tensor, fill: int) -> Tensor:
        missing = length - value.shape[1]
        return functional.pad(value, (0, 0, 0, missing) if value.dim() == 3 else (0, missing), value=fill)

    labels = [part.labels for part in parts]
    if labels[0].dim() > 1:
        labels = [widened(value, IGNORED) for value in labels]
    return FeatureBatch(
        torch.cat([widened(part.hidden, 0) for part in parts]),
        torch.cat([widened(part.attention_mask, 0) for part in parts]),
        torch.cat(labels),
    )


def _require_usable(losses: Sequence[Tensor], tops: Sequence[Parameters], gradients: Mapping[str, Tensor]) -> None:
    """Refuse a step that would spoil the top, and with it the whole run.

    Rows of a batch know nothing of each other, so what is not finite behind one device's features is its own doing;
    where that is so for all devices, the top itself has diverged.
    """
    steps = [value.grad for top in tops for value in top.values() if value.grad is not None]
    if all(bool(torch.isfinite(value).all()) for value in (*losses, *steps, *gradients.values())):
        return
    for top in tops:
        for value in top.values():
            value.grad = None
    blamed = [device for device, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    if 0 < len(blamed) < len(gradients):
        raise UnusableFeaturesError(blamed)
    finite = all(bool(torch.isfinite(loss)) for loss in losses)
    raise DivergedTopError(
        "a gradient of the server's half" if finite else "the loss of the server's half", list(gradients)
    )


def _require_moderate(top: Parameters, devices: Sequence[str]) -> None:
    """Raise DivergedTopError if a step on the features of these devices has left weights that are no usable numbers."""
    try:
        require_moderate({name: value.detach() for name, value in top.items()})
    except MessageError as error:
        raise DivergedTopError("the weights of the server's half", devices) from error
