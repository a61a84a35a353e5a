"""One round's conversation with every device of its cohort, over any engine.

    begin ▶ ◀ features 0,  step ▶ ◀ features 1,  …  step ▶ ◀ features tau-1,  finish ▶ ◀ bottoms

That is tau + 1 exchanges: the gradients of one iteration and the features of the next travel in one of them. A device
that is lost, or whose answer is refused, is out of the conversation from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from spinecli.errors import MessageError
from spinecli.federation.config import FeatureDtype
from spinecli.federation.engine import Engine, Job, Lost, Timing
from spinecli.federation.messages import Message
from spinecli.federation.split.messages import (
    BEGIN,
    FINISH,
    GRADIENT,
    STEP,
    TRAINED,
    BeginOrder,
    Diverging,
    Expected,
    FeatureBatch,
    StepOrder,
    checked_features,
    checked_parameters,
    diverging_of,
    packed,
)
from spinecli.federation.split.model import Parameters

_Checked = TypeVar("_Checked")


@dataclass(eq=False)
class ClientExchange:
    """What has been exchanged with one device in this round."""

    rows: int
    timings: list[Timing] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    """When each of these exchanges was over for everyone."""
    trained: list[bool] = field(default_factory=list)
    """Of each exchange, whether gradients went along."""
    lost: Lost | None = None

    @property
    def waiting_seconds(self) -> float:
        """From its answers until everybody's."""
        return sum(end - timing.arrived for end, timing in zip(self.ended, self.timings, strict=True))

    def note(self, timing: Timing, ended: float, *, trained: bool) -> None:
        """An exchange has come to its end."""
        self.timings.append(timing)
        self.ended.append(ended)
        self.trained.append(trained)

    def refuse(self, device: str, explanation: str) -> None:
        """Leave the device out from now on; the bytes of its last answer stay with their timing."""
        self.lost = Lost(device, "refused", explanation, self.timings[-1].seconds, bytes_down=0)


class DivergedDevicesError(Exception):
    """Devices have said that their own training has diverged.

    Attributes:
        devices: what has diverged, by device.
    """

    def __init__(self, devices: Mapping[str, Diverging]) -> None:
        super().__init__(f"training has diverged on {', '.join(devices)}")
        self.devices = dict(devices)


class Channel:
    """The conversation of one round.

    Args:
        order: what every device is told at the beginning; batch sizes are those of `cohort`.
        cohort: rows an iteration of each device.
        expected: what features must be like.
        deadline: seconds after which an exchange does not wait any longer.
    """

    def __init__(
        self, engine: Engine, order: BeginOrder, cohort: Mapping[str, int], expected: Expected, deadline: float | None
    ) -> None:
        self._engine = engine
        self._order = order
        self._expected = expected
        self._deadline = deadline
        self._iteration = -1
        self.talks = {device: ClientExchange(rows) for device, rows in cohort.items()}

    @property
    def present(self) -> list[str]:
        """Devices that are still in the conversation."""
        return [device for device, talk in self.talks.items() if talk.lost is None]

    def begin(self, bottom: Parameters) -> dict[str, FeatureBatch]:
        """Send the bottom; the features of the first iteration by device."""
        tensors = {TRAINED + name: value for name, value in bottom.items()}
        messages = {
            device: Message(
                self._order.model_copy(update={"batch_size": self.talks[device].rows}).model_dump(mode="json"), tensors
            )
            for device in self.present
        }
        self._iteration = 0
        return self._ask(BEGIN, messages, self._features)

    def step(self, gradients: Mapping[str, Tensor]) -> dict[str, FeatureBatch]:
        """Send gradients (tokens, d_model), or none to drop an iteration; the features of the next one by device."""
        messages = self._gradient_messages(gradients)
        self._iteration += 1
        return self._ask(STEP, messages, self._features)

    def finish(self, gradients: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameters]:
        """Send the last gradients; the bottoms by device."""

        def bottom(device: str, message: Message) -> Parameters:
            return checked_parameters(message, shapes)

        return self._ask(FINISH, self._gradient_messages(gradients), bottom)

    def _gradient_messages(self, gradients: Mapping[str, Tensor]) -> dict[str, Message]:
        order = StepOrder(round=self._order.round, iteration=self._iteration).model_dump(mode="json")
        return {
            device: Message(order, _gradient(gradients[device], self._order.feature_dtype) if gradients else {})
            for device in self.present
        }

    def _features(self, device: str, message: Message) -> FeatureBatch:
        return checked_features(message, self.talks[device].rows, self._iteration, self._expected)

    def _ask(
        self, kind: str, messages: Mapping[str, Message], check: Callable[[str, Message], _Checked]
    ) -> dict[str, _Checked]:
        parts = self._order.steps + 1
        part = self._iteration if kind != FINISH else self._order.steps
        jobs = [Job(device, kind, self._order.round, message, part, parts) for device, message in messages.items()]
        return exchanged(self._engine, jobs, self.talks, self._deadline, check)


def exchanged(
    engine: Engine,
    jobs: Sequence[Job],
    talks: Mapping[str, ClientExchange],
    deadline: float | None,
    check: Callable[[str, Message], _Checked],
) -> dict[str, _Checked]:
    """One exchange, noted in the devices' talks; the checked answers by device, without those that are out now.

    Args:
        check: makes of a device's name and message what is wanted of it, or raises MessageError.

    Raises: DivergedDevicesError.
    """
    outcomes = engine.exchange(jobs, deadline)
    ended = engine.now()
    answers: dict[str, _Checked] = {}
    diverging: dict[str, Diverging] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        talk = talks[job.device]
        if isinstance(outcome, Lost):
            talk.lost = outcome
            continue
        talk.note(outcome.timing, ended, trained=any(name.startswith(GRADIENT) for name in job.message.tensors))
        try:
            if (what := diverging_of(outcome.message)) is not None:
                diverging[job.device] = what
            else:
                answers[job.device] = check(job.device, outcome.message)
        except MessageError as error:
            talk.refuse(job.device, str(error))
    if diverging:
        raise DivergedDevicesError(diverging)
    return answers


def _gradient(values: Tensor, dtype: FeatureDtype) -> dict[str, Tensor]:
    return {GRADIENT + name: value for name, value in packed(values, dtype).items()}
