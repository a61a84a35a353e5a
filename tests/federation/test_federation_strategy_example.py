"""The example in docs/strategies.md is a strategy: it runs, differs from what it extends, and resumes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_federations import Maker, Watched, adapter_digest

from spinecli.federation.history import load_state
from spinecli.federation.strategies import STRATEGIES

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"


@pytest.fixture
def requests(requests: Maker, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """Makes requests; --strategy momentum is the page's own code."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)  # the page is this repository's own
    monkeypatch.setitem(STRATEGIES, "momentum", names["Momentum"])
    return requests


def test_it_is_fedit_in_its_first_round_and_moves_on_from_the_second(requests: Maker) -> None:
    momentum, plain = Watched(requests(strategy="momentum")), Watched(requests(strategy="fedit"))
    momentum.go_on(1)
    plain.go_on(1)
    for name, factors in plain.adapter.items():
        torch.testing.assert_close(momentum.adapter[name].a, factors.a)
        torch.testing.assert_close(momentum.adapter[name].b, factors.b)
    momentum.go_on(2)
    plain.go_on(2)
    gap = [float((momentum.adapter[name].b - factors.b).abs().max()) for name, factors in plain.adapter.items()]
    assert max(gap) > 1e-4


def test_resumed_after_a_kill_it_ends_with_the_same_bytes(requests: Maker, tmp_path: Path) -> None:
    whole = Watched(requests(strategy="momentum"))
    whole.go_on(4)
    whole.states[1].save(tmp_path)
    state = load_state(tmp_path)
    assert state is not None
    resumed = Watched(requests(strategy="momentum"))
    resumed.federation.strategy.restore(state.strategy)
    resumed.federation.engine.restore(state.engine)
    resumed.history.rounds.extend(whole.history.rounds[:2])
    resumed.go_on(4)
    assert adapter_digest(resumed.adapter) == adapter_digest(whole.adapter)


def test_a_round_without_answers_keeps_it_moving_by_what_it_has(requests: Maker) -> None:
    watched = Watched(requests(strategy="momentum"))
    watched.go_on(2)
    strategy: Any = watched.federation.strategy
    before, motion = strategy.adapter, dict(strategy.motion)
    strategy.aggregate_train(2, [], [])
    for name, factors in strategy.adapter.items():
        torch.testing.assert_close(factors.b, before[name].b + 0.5 * motion[name].b)
