"""The unsplit reference: every device of the cohort trains the whole model by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spinecli.federation.engine import Engine, Job
from spinecli.federation.messages import Message
from spinecli.split.channel import Talk, exchanged
from spinecli.split.messages import LOCAL, TRAINED, BeginOrder, checked_local_figures, checked_parameters
from spinecli.split.model import Parameters


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """What one device has made of the model."""

    trained: Parameters
    examples: int
    loss_before: float
    loss_after: float


def train_locally(
    engine: Engine, order: BeginOrder, cohort: Mapping[str, int], trained: Parameters, deadline: float | None
) -> tuple[dict[str, LocalUpdate], dict[str, Talk]]:
    """One exchange: the model out, and what each device has made of it back, checked."""
    tensors = {TRAINED + name: value for name, value in trained.items()}
    shapes = {name: tuple(value.shape) for name, value in trained.items()}
    jobs = [
        Job(device, LOCAL, order.round, Message({**order.model_dump(mode="json"), "batch_size": rows}, tensors))
        for device, rows in cohort.items()
    ]
    talks = {device: Talk(rows) for device, rows in cohort.items()}

    def update(_: str, message: Message) -> LocalUpdate:
        figures = checked_local_figures(message)
        return LocalUpdate(
            checked_parameters(message, shapes), figures.examples, figures.loss_before, figures.loss_after
        )

    return exchanged(engine, jobs, talks, deadline, update), talks
