"""Small federations: tiny models, a fleet of five devices, labelled texts, and runs of a few short rounds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from families import WORDS, Recipe, recipe
from sums import digest

from spinecli.config import make_config, read_config
from spinecli.federation.config import FederateConfig
from spinecli.federation.engine import Lost
from spinecli.federation.history import History, RoundRecord, RunState
from spinecli.federation.loop import Loop
from spinecli.federation.request import FederatedRequest, open_request
from spinecli.federation.run import Federation, set_up
from spinecli.federation.strategies.strategy import ClientUpdate, TrainInstruction
from spinecli.lora.factors import Adapter

LLAMA = recipe("llama", grouped=True)
LABELS = ("calm", "loud")
SLOW, FAST = 3, 2
PLAIN: dict[str, Any] = {
    "evaluation_share": 0.2,
    "max_length": 16,
    "cohort": 3,
    "rank": 4,
    "smallest_rank": 2,
    "largest_rank": 6,
    "rounds": 4,
    "local_steps": 2,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "sparsity": 0.4,
    "prune_interval": 1,
}


def fleet_text(
    *, slow: int = SLOW, fast: int = FAST, dropout: float = 0.0, slow_gb: float = 1.0, fast_gb: float = 4.0
) -> str:
    return f"""
name = "five"
[[class]]
name = "slow"
count = {slow}
modes = [4e8, 2e8]
mode_rounds = 2
up_mbps = [1, 2]
down_mbps = [5, 10]
memory_gb = {slow_gb}
jitter = 0.2
dropout = {dropout}
latency_ms = 10
[[class]]
name = "fast"
count = {fast}
modes = 2e9
mode_rounds = 0
up_mbps = 4
down_mbps = 20
memory_gb = {fast_gb}
dropout = {dropout}
"""


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts whose words tell their label, mostly."""
    chosen, half = random.Random(seed), len(WORDS) // 2
    rows = []
    for index in range(count):
        label = index % 2
        own, other = WORDS[label * half :][:half], WORDS[(1 - label) * half :][:half]
        words = [chosen.choice(own if chosen.random() < 0.85 else other) for _ in range(chosen.randint(4, 7))]
        rows.append({"text": " ".join(words), "label": LABELS[label]})
    return rows


@dataclass(frozen=True)
class Maker:
    """Makes requests in a folder of its own, by the names of options and of `fleet_text`."""

    folder: Path
    written: Callable[[Recipe], Path]

    def __call__(self, made: Recipe = LLAMA, **changes: Any) -> FederatedRequest:
        return open_request(self.config(made, **changes))

    def config(
        self, made: Recipe = LLAMA, *, fleet: Mapping[str, Any] | None = None, examples: int = 60, **changes: Any
    ) -> FederateConfig:
        data, place = self.folder / "rows.jsonl", self.folder / "fleet.toml"
        data.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(examples)))
        place.write_text(fleet_text(**(fleet or {})))
        files = {"model": str(self.written(made)), "data": str(data), "fleet": str(place)}
        return read_config(FederateConfig, None, {**files, **PLAIN, **changes})


@dataclass(eq=False)
class Watched:
    """A federation that keeps what its strategy was told."""

    request: FederatedRequest
    federation: Federation = field(init=False)
    history: History = field(init=False)
    assignments: list[dict[str, TrainInstruction]] = field(default_factory=list)
    updates: list[Sequence[ClientUpdate]] = field(default_factory=list)
    lost: list[Sequence[Lost]] = field(default_factory=list)
    states: list[RunState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.federation = set_up(self.request)
        self.history = History(None)
        strategy: Any = self.federation.strategy
        configure_train, aggregate_train = strategy.configure_train, strategy.aggregate_train

        def assigning(number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
            self.assignments.append(configure_train(number, cohort))
            return self.assignments[-1]

        def absorbing(number: int, updates: Sequence[ClientUpdate], lost: Sequence[Lost]) -> None:
            self.updates.append(updates)
            self.lost.append(lost)
            aggregate_train(number, updates, lost)

        strategy.configure_train, strategy.aggregate_train = assigning, absorbing

    @property
    def adapter(self) -> Adapter:
        return self.federation.strategy.model().adapter

    def go_on(self, rounds: int, **changes: Any) -> list[RoundRecord]:
        """Run until `rounds` rounds are in the history; returns those that are new."""
        before = len(self.history.rounds)
        federation = self.federation
        config = make_config(FederateConfig, self.request.config, {"rounds": rounds, **changes})
        training = replace(federation.training, setting=replace(federation.setting, config=config))
        loop = Loop(config, training, federation.evaluate, self.states.append)
        loop.run(self.history, lambda record: None)
        return self.history.rounds[before:]


def adapter_digest(adapter: Adapter) -> str:
    return digest({f"{name}.{side}": getattr(factors, side) for name, factors in adapter.items() for side in "ab"})
