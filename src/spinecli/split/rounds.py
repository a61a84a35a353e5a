"""The round loop of split training: plan, converse, step, average, measure, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue
from torch import Tensor

from spinecli.federation.engine import Engine, Snapshot
from spinecli.federation.history import (
    DeviceRecord,
    History,
    IterationRecord,
    Measurement,
    RoundRecord,
    SplitRecord,
)
from spinecli.federation.rounds import Listener, RoundOptions, diverged, measured, named, run_rounds
from spinecli.federation.schedule import learning_rate
from spinecli.federation.state import RunState
from spinecli.lora.aggregation.averaging import average_tensors
from spinecli.split.channel import Channel, DivergedDevicesError, Talk
from spinecli.split.control.options import ControlOptions
from spinecli.split.control.plan import ControlPlan, plan_round
from spinecli.split.control.population import Population
from spinecli.split.control.state import ControlState
from spinecli.split.cost import SplitCosts
from spinecli.split.local_round import train_locally
from spinecli.split.messages import BeginOrder, Expected, FeatureBatch, Optimizer
from spinecli.split.model import Parameters
from spinecli.split.observation import pace_of
from spinecli.split.probe import look_at
from spinecli.split.server import DivergedTopError, Top, UnusableFeaturesError

_BOTTOM, _TOP = "bottom.", "top."


@dataclass(frozen=True)
class SplitTraining:
    """How devices and server go downhill, the same in all rounds."""

    steps: int
    """tau: iterations of a round."""
    learning_rate: float
    optimizer: Optimizer
    seed: int
    split: bool
    """False: devices train the whole model, and the server only averages."""


@dataclass(eq=False)
class SplitLoop:
    """Everything the rounds need."""

    options: RoundOptions
    training: SplitTraining
    engine: Engine
    population: Population
    control: ControlOptions
    top: Top
    bottom: dict[str, Tensor]
    """What all devices start a round from."""
    costs: SplitCosts
    expected: Expected
    evaluate: Callable[[Parameters], Measurement]
    save: Callable[[RunState], None]
    state: ControlState
    row_bytes: float
    """Of one row's features, on average."""
    probe: Callable[[Parameters], Measurement] | None = None
    """Measures on a few rows, in rounds that are not evaluated, whether the model still gives numbers."""

    @property
    def trained(self) -> dict[str, Tensor]:
        """Trained tensors of both halves, where the model computes."""
        place = self.top.model.compute.device
        bottom = {name: value.to(place) for name, value in self.bottom.items()}
        return {**bottom, **{name: value.detach() for name, value in self.top.trained.items()}}

    def run(self, history: History, listener: Listener) -> None:
        """Run what rounds are left after those in the history.

        Raises: FederationError if a loss, features, gradients or weights are not finite any more; the state saved is
        then that of the round before.
        """

        def keep(finished: int) -> None:
            self.save(RunState(finished, self.snapshot(), self.engine.snapshot()))

        run_rounds(self.options, history, self._round, keep, listener)

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

    def _round(self, number: int) -> RoundRecord:
        rate = learning_rate(self.training.learning_rate, self.options.schedule, number, self.options.rounds)
        began = self.engine.now()
        probed = self._look() if number == 0 and self.training.split and self.control.regulation else 0
        plan = plan_round(self.state, self.population, self.control, self.training.seed, number)
        order = BeginOrder(
            round=number,
            seed=self.training.seed,
            steps=self.training.steps,
            batch_size=1,  # each device is told its own
            learning_rate=rate,
            optimizer=self.training.optimizer,
            clip_norm=self.options.clip_norm,
            feature_dtype=self.expected.feature_dtype,
        )
        try:
            talks, iterations, losses = self._split(order, plan) if self.training.split else self._local(order, plan)
        except DivergedDevicesError as error:
            parts = sorted(set(error.devices.values()))
            whose = [
                f"the {part} of {named([each for each in error.devices if error.devices[each] == part])}"
                for part in parts
            ]
            raise diverged(
                number, self.options.rounds, f"{' and '.join(whose)} left the range of usable numbers"
            ) from error
        except DivergedTopError as error:
            what = f"{error.what} left the range of usable numbers on the features of {named(error.among)}"
            raise diverged(number, self.options.rounds, what) from error
        ended = self.engine.now()
        answered = [device for device, talk in talks.items() if talk.lost is None]
        return RoundRecord(
            round=number,
            began=began,
            ended=ended,
            learning_rate=rate,
            evaluation=measured(self.options, number, self.trained, answered, self.evaluate, self.probe),
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
        look = look_at(self.engine, limits, self.row_bytes, self.options.deadline)
        self.state = self.state.after_round(look.paces, [])
        return look.bytes

    def _split(
        self, order: BeginOrder, plan: ControlPlan
    ) -> tuple[Mapping[str, Talk], list[IterationRecord], dict[str, tuple[float, float]]]:
        """Tau iterations with the server in between, and the mean of the bottoms (Eq. 17)."""
        channel = Channel(self.engine, order, plan.cohort, self.expected, self.options.deadline)
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
    ) -> tuple[Mapping[str, Talk], list[IterationRecord], dict[str, tuple[float, float]]]:
        """Every device trains the whole model, and the mean by examples is the next one (FedAvg)."""
        updates, talks = train_locally(self.engine, order, plan.cohort, self.trained, self.options.deadline)
        if updates:
            weights = [update.examples for update in updates.values()]
            mean = average_tensors([update.trained for update in updates.values()], weights)
            self.bottom = {name: mean[name] for name in self.bottom}
            self.top.restore({name: mean[name] for name in self.top.trained})
        self.state = self.state.after_round({}, list(updates))
        losses = {device: (update.loss_before, update.loss_after) for device, update in updates.items()}
        return talks, [], losses


def _device_record(device: str, talk: Talk, losses: tuple[float, float] | None, ended: float) -> DeviceRecord:
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
