"""Small split runs: tiny models, a few devices, labelled texts or plain ones, and rounds that can be watched."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import VOCABULARY, WORDS, Recipe, recipe
from torch import Tensor
from torch.nn import functional

from spinecli.artifacts.seeding import torch_generator
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.config import read_config
from spinecli.data.batches import IGNORED, Batch, batches
from spinecli.data.config import Task
from spinecli.federation.config import FederateConfig, LoraConfig, SplitConfig
from spinecli.federation.engine import Job, Lost, Reply
from spinecli.federation.history import History, RoundRecord, RunState
from spinecli.federation.loop import Loop
from spinecli.federation.messages import Message
from spinecli.federation.request import open_request
from spinecli.federation.simulation.local_engine import LocalEngine
from spinecli.federation.split.control.plan import ControlPlan
from spinecli.federation.split.device import SplitDevice, handle
from spinecli.federation.split.messages import PROBE
from spinecli.federation.split.model import Parameters, SplitModel
from spinecli.federation.split.request import SplitRequest, split_request
from spinecli.federation.split.rounds import SplitTraining
from spinecli.federation.split.run import SplitFederation, set_up

LLAMA = recipe("llama", grouped=True)
LABELS = ("calm", "loud")
SEED = 3
PAD = 0
LORA = {"bottom": "lora", "top": "lora"}
PLAIN: dict[str, Any] = {
    "strategy": "mergesfl",
    "evaluation_share": 0.2,
    "max_length": 16,
    "cohort": 3,
    "rank": 4,
    "rounds": 3,
    "local_steps": 3,
    "batch_size": 4,
    "learning_rate": 0.05,
    **LORA,
}
NO_CLIPPING = 1e9

_EQUAL = """
[[class]]
name = "equal"
count = 4
modes = 1e9
mode_rounds = 0
up_mbps = 4
down_mbps = 8
memory_gb = 1
latency_ms = 5
"""

_MIXED = """
[[class]]
name = "slow"
count = 3
modes = [4e8, 2e8]
mode_rounds = 2
up_mbps = [1, 2]
down_mbps = [5, 10]
memory_gb = 1
jitter = {jitter}
dropout = {dropout}
latency_ms = 10
[[class]]
name = "fast"
count = 2
modes = 2e9
mode_rounds = 0
up_mbps = 4
down_mbps = 20
memory_gb = 1
dropout = {dropout}
"""


def fleet_text(*, equal: bool = False, dropout: float = 0.0, jitter: float = 0.2, server_flops: float = 1e12) -> str:
    """Four devices that are all alike, or five of two classes."""
    classes = _EQUAL if equal else _MIXED.format(dropout=dropout, jitter=jitter)
    return f'name = "few"\nserver_flops = {server_flops}\n{classes}'


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of different lengths whose words tell their label, mostly."""
    chosen, half = random.Random(seed), len(WORDS) // 2
    rows = []
    for index in range(count):
        label = index % 2
        own, other = WORDS[label * half :][:half], WORDS[(1 - label) * half :][:half]
        words = [chosen.choice(own if chosen.random() < 0.85 else other) for _ in range(chosen.randint(3, 8))]
        rows.append({"text": " ".join(words), "label": LABELS[label]})
    return rows


def plain_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of different lengths without labels."""
    chosen = random.Random(seed)
    return [{"text": " ".join(chosen.choices(WORDS, k=chosen.randint(3, 8)))} for _ in range(count)]


@dataclass(frozen=True)
class SplitMaker:
    """Makes requests in a folder of its own, from values of all options and of `fleet_text` by name."""

    folder: Path
    written: Callable[[Recipe], Path]

    def __call__(
        self,
        made: Recipe = LLAMA,
        *,
        fleet: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, str]] | None = None,
        task: Task = "classification",
        **changes: Any,
    ) -> SplitRequest:
        rows = rows or (labelled_rows(60) if task == "classification" else plain_rows(60))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        data = self._file("rows.jsonl", text)
        place = self._file("fleet.toml", fleet_text(**(fleet or {})))
        files = {"model": str(self.written(made)), "data": str(data), "fleet": str(place)}
        cut = {} if changes.get("strategy") == "fedavg" else {"cut_layer": 1}
        config = read_config(FederateConfig, None, {**files, **PLAIN, **cut, **changes})
        return split_request(open_request(config))

    def _file(self, name: str, text: str) -> Path:
        """A file that keeps its name only while its content stays the same, as requests read it again."""
        place = self.folder / hashlib.sha256(text.encode()).hexdigest()[:8] / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
        return place


Answer = Callable[[str, Message, SplitDevice], Message]
"""What a device does with a message of a kind."""


@dataclass(eq=False)
class Watched:
    """A run that keeps all that was exchanged, and whose devices may be told to misbehave."""

    request: SplitRequest
    misbehaving: Mapping[str, Answer] = field(default_factory=dict)
    """By device name."""
    federation: SplitFederation = field(init=False)
    history: History = field(init=False)
    states: list[RunState] = field(default_factory=list)
    exchanges: list[list[tuple[Job, Reply | Lost]]] = field(default_factory=list)
    """All but the first look at the devices."""
    probes: list[list[tuple[Job, Reply | Lost]]] = field(default_factory=list)
    probe_seconds: float = 0.0
    work: list[float] = field(default_factory=list)
    """FLOPs of the server."""

    def __post_init__(self) -> None:
        self.federation = set_up(self.request)
        self.history = History(None)
        engine: Any = self.training.engine
        exchange, work = engine.exchange, engine.work

        def exchanging(jobs: Sequence[Job], deadline: float | None) -> list[Reply | Lost]:
            began = engine.now()
            outcomes: list[Reply | Lost] = exchange(jobs, deadline)
            looks = {job.kind for job in jobs} == {PROBE}
            (self.probes if looks else self.exchanges).append(list(zip(jobs, outcomes, strict=True)))
            self.probe_seconds += (engine.now() - began) * looks
            return outcomes

        def working(flops: float) -> None:
            self.work.append(flops)
            work(flops)

        engine.exchange, engine.work = exchanging, working
        engine._handle = self._answer

    def _answer(self, kind: str, message: Message, device: SplitDevice) -> Message:
        return self.misbehaving.get(device.name, handle)(kind, message, device)

    @property
    def training(self) -> SplitTraining:
        return self.federation.training

    @property
    def engine(self) -> LocalEngine[SplitDevice]:
        return self.training.engine

    @property
    def rounds(self) -> list[RoundRecord]:
        return self.history.rounds

    @property
    def trained(self) -> dict[str, Tensor]:
        """Both halves as they are now, which the next step does not change any more."""
        return {name: value.clone() for name, value in self.training.model.items()}

    def device(self, name: str) -> SplitDevice:
        return self.engine._devices[name].work

    def go_on(self, rounds: int | None = None) -> list[RoundRecord]:
        """Run until `rounds` rounds, or all, are in the history; returns those that are new."""
        before = len(self.rounds)
        federation, save = self.federation, self.states.append
        loop = Loop(self.request.config, self.training, federation.evaluate, save, federation.probe)
        with suppress(_StoppedError):
            loop.run(self.history, _StopAfter(rounds))
        return self.rounds[before:]

    def losses(self) -> list[float | None]:
        """Of every iteration of all rounds."""
        return [
            iteration.loss
            for record in self.rounds
            if record.split is not None
            for iteration in record.split.iterations
        ]


class _StoppedError(Exception):
    pass


@dataclass(frozen=True)
class _StopAfter:
    rounds: int | None

    def __call__(self, record: RoundRecord) -> None:
        if record.round + 1 == self.rounds:
            raise _StoppedError


def split_model(
    checkpoint: Checkpoint,
    cut: int,
    *,
    task: Task = "classification",
    labels: int = 3,
    seed: int = SEED,
    **modes: Any,
) -> SplitModel:
    split, lora = split_configs(**{"rank": 2, **modes})
    return SplitModel(checkpoint, task, labels, cut, split, lora, PAD, seed, ComputeOptions())


def split_configs(**values: Any) -> tuple[SplitConfig, LoraConfig]:
    """What is trained of each half, LoRA unless it is said otherwise, by the names of fields."""
    lora = {name: value for name, value in values.items() if name in LoraConfig.model_fields}
    split = {name: value for name, value in values.items() if name not in lora}
    return SplitConfig(**{**LORA, **split}), LoraConfig(**lora)


def random_batch(lengths: Sequence[int], *, task: Task = "classification", labels: int = 3, seed: int = 0) -> Batch:
    """Rows of these lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    present = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = tokens.masked_fill(~present, PAD)
    if task == "classification":
        targets = torch.randint(labels, (len(lengths),), generator=generator)
    else:
        targets = tokens.masked_fill(~present, IGNORED)
    return Batch(tokens, present.to(torch.int64), targets, torch.arange(len(lengths)))


def moved(parameters: Parameters, seed: int = 1, by: float = 0.05) -> dict[str, Tensor]:
    """Parameters a little elsewhere, as after some training: a LoRA that changes nothing would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value.detach() + by * torch.randn(value.shape, generator=generator))
        for name, value in parameters.items()
    }


def leaves(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_(True) for name, value in parameters.items()}


def concatenated(parts: Sequence[Batch]) -> Batch:
    """Rows of several batches as one, padded to the longest of all."""
    longest = max(batch.input_ids.shape[1] for batch in parts)

    def wide(value: Tensor, fill: int) -> Tensor:
        return functional.pad(value, (0, longest - value.shape[1]), value=fill)

    labels = [wide(batch.labels, IGNORED) if batch.labels.dim() > 1 else batch.labels for batch in parts]
    return Batch(
        torch.cat([wide(batch.input_ids, PAD) for batch in parts]),
        torch.cat([wide(batch.attention_mask, 0) for batch in parts]),
        torch.cat(labels),
        torch.cat([batch.row_numbers for batch in parts]),
    )


def batches_of(watched: Watched, record: RoundRecord) -> dict[str, list[Batch]]:
    """The batches that the devices of a round have drawn, by the rule of the device and not by asking it."""
    request, steps = watched.request, watched.training.config.train.local_steps
    drawn = {}
    for device in record.devices:
        generator = torch_generator(request.config.seed, "batches", device.device, record.round)
        own = watched.device(device.device).indices
        drawn[device.device] = list(batches(request.train, own, device.batch, steps, generator))
    return drawn


def sgd_step(model: SplitModel, trained: Parameters, batch: Batch, rate: float) -> tuple[float, dict[str, Tensor]]:
    """The loss of the unsplit model on a batch, and the model after one plain step."""
    own = leaves(trained)
    loss = functional.cross_entropy(*model.joined_answers(own, batch))
    loss.backward()  # type: ignore[no-untyped-call]
    after = {name: value if value.grad is None else value - rate * value.grad for name, value in own.items()}
    return float(loss.detach()), {name: value.detach() for name, value in after.items()}


def planned(cohort: Mapping[str, int]) -> ControlPlan:
    """A plan that is given and not made."""
    return ControlPlan(dict(cohort), 0.0, 0.0, True, 1, None, None)
