"""A round of split training: plan, converse, step, average.

The server's first look at its devices: how fast each computes and communicates, before any of them trains.

MergeSFL assumes that the state of every device is known when a round is planned. After the first look only those that
take part are observed. How the look is taken is this project's own: two exchanges of different sizes tell a link's rate
from its latency, with a few rows of the device's own forward and backward in each; nothing that is computed leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import JsonValue
from torch import Tensor

from spinecli.federation.config import FederateConfig
from spinecli.federation.engine import Engine, Job, Reply, Snapshot
from spinecli.federation.history import DeviceRecord, IterationRecord, RoundRecord, SplitRecord
from spinecli.federation.loop import RoundStart, named
from spinecli.federation.messages import Message
from spinecli.federation.split.channel import Channel, ClientExchange, DivergedDevicesError, exchanged
from spinecli.federation.split.control.estimates import Iteration, Pace, Population, Transfer, observed_pace
from spinecli.federation.split.control.plan import ControlOptions, ControlPlan, ControlState, plan_round
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.messages import (
    LOCAL,
    PAYLOAD,
    PROBE,
    TRAINED,
    BeginOrder,
    Expected,
    FeatureBatch,
    ProbeOrder,
    checked_local_figures,
    checked_parameters,
)
from spinecli.federation.split.model import Parameters
from spinecli.federation.split.server import DivergedTopError, Top, UnusableFeaturesError
from spinecli.lora.aggregation.averaging import average_tensors


def pace_of(talk: ClientExchange, steps: int) -> Pace | None:
    """The pace of a device in a round of `steps` iterations; None if it was lost before it could tell.

    An exchange in the middle of a round is backward through one batch and forward through the next, which is what an
    iteration computes; the features of exchange k belong to the gradients of exchange k + 1. A round of one iteration
    has no middle, and its two exchanges together are the iteration.
    """
    timings = talk.timings
    uploads = [Transfer(timing.bytes_up, timing.upload_seconds) for timing in timings]
    downloads = [Transfer(timing.bytes_down, timing.download_seconds) for timing in timings]
    if steps == 1:
        if len(timings) < 2 or not talk.trained[1]:
            return None
        compute = timings[0].compute_seconds + timings[1].compute_seconds
        whole = [Iteration(talk.rows, compute, uploads[0], downloads[1])]
        return observed_pace(whole, uploads[1:], downloads[:1])
    middle = [k for k in range(1, min(steps, len(timings))) if talk.trained[k]]
    iterations = [Iteration(talk.rows, timings[k].compute_seconds, uploads[k], downloads[k]) for k in middle]
    return observed_pace(iterations, [*uploads[:1], *uploads[steps:]], [*downloads[:1], *downloads[steps:]])


_ROWS = (1, 4)


@dataclass(frozen=True)
class ProbeResult:
    """What a first look has shown."""

    paces: dict[str, Pace | None]
    """By device; those that did not answer twice are left out."""
    bytes: int
    """That it took, both ways."""


def look_at(engine: Engine, limits: Mapping[str, int], row_bytes: float, deadline: float | None) -> ProbeResult:
    """Probe all devices at once, with messages as large as features of as many rows would be.

    Args:
        limits: most rows that each device's memory holds; by device.
        row_bytes: of one row's features.
        deadline: seconds after which an exchange does not wait any longer.
    """
    iterations: dict[str, list[Iteration]] = {device: [] for device in limits}
    sent = 0
    for part, wanted in enumerate(_ROWS):
        rows_of = {device: min(wanted, limit) for device, limit in limits.items()}
        messages = {rows: _message(rows, row_bytes) for rows in set(rows_of.values())}
        jobs = [Job(device, PROBE, 0, messages[rows], part, len(_ROWS)) for device, rows in rows_of.items()]
        for outcome in engine.exchange(jobs, deadline):
            if isinstance(outcome, Reply):
                timing = outcome.timing
                sent += timing.bytes_down + timing.bytes_up
                upload = Transfer(timing.bytes_up, timing.upload_seconds)
                download = Transfer(timing.bytes_down, timing.download_seconds)
                iterations[outcome.device].append(
                    Iteration(rows_of[outcome.device], timing.compute_seconds, upload, download)
                )
            else:
                sent += outcome.bytes_down
    seen = {device: each for device, each in iterations.items() if len(each) == len(_ROWS)}
    return ProbeResult({device: observed_pace(each) for device, each in seen.items()}, sent)


def _message(rows: int, row_bytes: float) -> Message:
    payload = {PAYLOAD: torch.zeros(math.ceil(rows * row_bytes), dtype=torch.uint8)}
    return Message(ProbeOrder(rows=rows).model_dump(mode="json"), payload)


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """What one device has made of the model."""

    trained: Parameters
    examples: int
    loss_before: float
    loss_after: float


def train_locally(
    engine: Engine, order: BeginOrder, cohort: Mapping[str, int], trained: Parameters, deadline: float | None
) -> tuple[dict[str, LocalUpdate], dict[str, ClientExchange]]:
    """One exchange: the model out, and what each device has made of it back, checked."""
    tensors = {TRAINED + name: value for name, value in trained.items()}
    shapes = {name: tuple(value.shape) for name, value in trained.items()}
    jobs = [
        Job(device, LOCAL, order.round, Message({**order.model_dump(mode="json"), "batch_size": rows}, tensors))
        for device, rows in cohort.items()
    ]
    talks = {device: ClientExchange(rows) for device, rows in cohort.items()}

    def update(_: str, message: Message) -> LocalUpdate:
        figures = checked_local_figures(message)
        return LocalUpdate(
            checked_parameters(message, shapes), figures.examples, figures.loss_before, figures.loss_after
        )

    return exchanged(engine, jobs, talks, deadline, update), talks


_BOTTOM, _TOP = "bottom.", "top."


@dataclass(eq=False)
class SplitTraining:
    """Everything that rounds of split training need."""

    config: FederateConfig
    split: bool
    """False: devices train the whole model, and the server only averages."""
    engine: Engine
    population: Population
    control: ControlOptions
    top: Top
    bottom: dict[str, Tensor]
    """What all devices start a round from."""
    costs: SplitCosts
    expected: Expected
    row_bytes: float
    """Of one row's features, on average."""
    state: ControlState = field(default_factory=ControlState)

    @property
    def model(self) -> dict[str, Tensor]:
        """Trained tensors of both halves, where the model computes."""
        place = self.top.model.compute.device
        bottom = {name: value.to(place) for name, value in self.bottom.items()}
        return {**bottom, **{name: value.detach() for name, value in self.top.trained.items()}}

    def snapshot(self) -> Snapshot:
        """Both halves and what the control module knows."""
        values: dict[str, JsonValue] = {"control": dict(self.state.values())}
        tensors = {
            **{_BOTTOM + name: value for name, value in self.bottom.items()},
            **{_TOP + name: value for name, value in self.top.tensors().items()},
        }
        return Snapshot(values, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        self.state = ControlState.model_validate(snapshot.values["control"])
        kept = {
            side: {name.removeprefix(side): value for name, value in snapshot.tensors.items() if name.startswith(side)}
            for side in (_BOTTOM, _TOP)
        }
        self.bottom = {name: kept[_BOTTOM][name] for name in self.bottom}
        self.top.restore(kept[_TOP])

    def play(self, start: RoundStart) -> RoundRecord:
        """One round.

        Raises: FederationError if a loss, features, gradients or weights are not finite any more.
        """
        config, train, number = self.config, self.config.train, start.number
        began = self.engine.now()
        probed = self._look() if number == 0 and self.split and self.control.regulation else 0
        plan = plan_round(self.state, self.population, self.control, config.seed, number)
        order = BeginOrder(
            round=number,
            seed=config.seed,
            steps=train.local_steps,
            batch_size=1,  # each device is told its own
            learning_rate=start.learning_rate,
            optimizer=config.split.optimizer,
            clip_norm=train.clip_norm,
            feature_dtype=self.expected.feature_dtype,
        )
        try:
            talks, iterations, losses = self._split(order, plan) if self.split else self._local(order, plan)
        except DivergedDevicesError as error:
            parts = sorted(set(error.devices.values()))
            whose = [
                f"the {part} of {named([each for each in error.devices if error.devices[each] == part])}"
                for part in parts
            ]
            raise start.diverged(f"{' and '.join(whose)} left the range of usable numbers") from error
        except DivergedTopError as error:
            what = f"{error.what} left the range of usable numbers on the features of {named(error.among)}"
            raise start.diverged(what) from error
        ended = self.engine.now()
        return RoundRecord(
            round=number,
            began=began,
            ended=ended,
            learning_rate=start.learning_rate,
            devices=tuple(_device_record(device, talk, losses.get(device), ended) for device, talk in talks.items()),
            split=SplitRecord(
                divergence=plan.divergence,
                selected_divergence=plan.selected_divergence,
                feasible=plan.feasible,
                predicted_seconds=plan.seconds,
                probed_bytes=probed,
                iterations=tuple(iterations),
            ),
        )

    def _look(self) -> int:
        """Find out how fast every device is, and how many bytes that took."""
        limits = dict(zip(self.population.names, self.population.memory_limits, strict=True))
        look = look_at(self.engine, limits, self.row_bytes, self.config.train.deadline)
        self.state = self.state.after_round(look.paces, [])
        return look.bytes

    def _split(
        self, order: BeginOrder, plan: ControlPlan
    ) -> tuple[Mapping[str, ClientExchange], list[IterationRecord], dict[str, tuple[float, float]]]:
        """Tau iterations with the server in between, and the mean of the bottoms (Eq. 17)."""
        channel = Channel(self.engine, order, plan.cohort, self.expected, self.config.train.deadline)
        self.top.begin(order.learning_rate, list(plan.cohort))
        iterations: list[IterationRecord] = []
        answers = dict.fromkeys(plan.cohort, 0)
        asked = list(plan.cohort)
        features = channel.begin(self.bottom)
        gradients: dict[str, Tensor] = {}
        for iteration in range(order.steps):
            ended, loss, gradients = self.engine.now(), None, {}
            if features and len(features) == len(asked):
                try:
                    loss, gradients = self._step(features)
                except DivergedTopError:
                    raise
                except UnusableFeaturesError as error:
                    for device in error.devices:
                        channel.talks[device].refuse(device, "The top makes no finite numbers of its features.")
                for device in gradients:
                    answers[device] += features[device].answers
            iterations.append(
                IterationRecord(ended=ended, rows=sum(batch.rows for batch in features.values()), loss=loss)
            )
            asked = channel.present
            if not asked:
                break
            if iteration + 1 < order.steps:
                features = channel.step(gradients)
        shapes = {name: tuple(value.shape) for name, value in self.bottom.items()}
        bottoms = channel.finish(gradients, shapes) if asked else {}
        weights = {device: answers[device] for device in bottoms if answers[device]}
        if weights:
            self.bottom = average_tensors([bottoms[device] for device in weights], list(weights.values()))
        self.top.end({device: float(weight) for device, weight in weights.items()})
        observed = {device: pace_of(talk, order.steps) for device, talk in channel.talks.items()}
        self.state = self.state.after_round(observed, list(weights))
        return channel.talks, iterations, {}

    def _step(self, features: Mapping[str, FeatureBatch]) -> tuple[float, dict[str, Tensor]]:
        """The server's step, and what it takes on the clock."""
        loss, gradients = self.top.step(features)
        self.engine.work(sum(self.costs.top(rows, length).flops for rows, length in self.top.computed(features)))
        return loss, gradients

    def _local(
        self, order: BeginOrder, plan: ControlPlan
    ) -> tuple[Mapping[str, ClientExchange], list[IterationRecord], dict[str, tuple[float, float]]]:
        """Every device trains the whole model, and the mean by examples is the next one (FedAvg)."""
        updates, talks = train_locally(self.engine, order, plan.cohort, self.model, self.config.train.deadline)
        if updates:
            weights = [update.examples for update in updates.values()]
            mean = average_tensors([update.trained for update in updates.values()], weights)
            self.bottom = {name: mean[name] for name in self.bottom}
            self.top.restore({name: mean[name] for name in self.top.trained})
        self.state = self.state.after_round({}, list(updates))
        losses = {device: (update.loss_before, update.loss_after) for device, update in updates.items()}
        return talks, [], losses


def _device_record(device: str, talk: ClientExchange, losses: tuple[float, float] | None, ended: float) -> DeviceRecord:
    lost, timings = talk.lost, talk.timings
    tail = ended - talk.ended[-1] if talk.ended and lost is None else 0.0
    return DeviceRecord(
        device=device,
        lost=lost.reason if lost else None,
        explanation=lost.explanation if lost else "",
        download_seconds=sum(timing.download_seconds for timing in timings),
        compute_seconds=sum(timing.compute_seconds for timing in timings),
        upload_seconds=sum(timing.upload_seconds for timing in timings),
        waiting_seconds=talk.waiting_seconds + tail,
        bytes_down=sum(timing.bytes_down for timing in timings) + (lost.bytes_down if lost else 0),
        bytes_up=sum(timing.bytes_up for timing in timings),
        loss_before=losses[0] if losses else None,
        loss_after=losses[1] if losses else None,
        batch=talk.rows,
    )
