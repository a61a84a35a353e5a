from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_federations import SLOW, Watched, adapter_digest
from sums import digest
from torch import Tensor

from spinecli.errors import MessageError
from spinecli.federation.engine import Reply
from spinecli.federation.messages import Message
from spinecli.federation.updates import checked_update

FIRST = "lora.model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


@pytest.fixture
def ordered(requests: Any) -> Callable[..., tuple[Watched, Reply]]:
    """A federation after one cut, and an answer of its second round with what went before."""

    def make(strategy: str = "fed-loraprune") -> tuple[Watched, Reply]:
        watched = Watched(requests(strategy=strategy, cohort=SLOW, rounds=4))
        kept: list[Reply] = []
        exchange = watched.federation.engine.exchange

        def keeping(jobs: Any, deadline: Any) -> Any:
            outcomes = exchange(jobs, deadline)
            kept[:] = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
            return outcomes

        watched.federation.engine.exchange = keeping  # type: ignore[method-assign]
        watched.go_on(2)
        return watched, kept[0]

    return make


def check(watched: Watched, reply: Reply, message: Message | None = None, before: Any = None) -> Any:
    assignment = watched.assignments[-1][reply.device]
    return checked_update(
        reply if message is None else replace(reply, message=message), assignment, watched.federation.setting, before
    )


@pytest.mark.parametrize("strategy", ["fed-loraprune", "fedit", "ffa-lora", "flora"])
def test_an_honest_answer_is_taken_as_it_is(ordered: Any, strategy: str) -> None:
    watched, reply = ordered(strategy)
    update = check(watched, reply)
    assert update.device == reply.device
    assert update.weight == reply.message.header["examples"] == update.contribution.weight
    assert update.ratio == pytest.approx(reply.message.header.get("ratio", 0.0))
    assert (update.masks is not None) == (update.importance is not None) == (strategy == "fed-loraprune")
    assert list(update.contribution.adapter) == list(watched.federation.setting.projections)
    sent = reply.message.tensors
    for name, factors in update.contribution.adapter.items():
        assert torch.equal(factors.b, sent[f"lora.{name}.b"])
        assert f"lora.{name}.a" not in sent or torch.equal(factors.a, sent[f"lora.{name}.a"])
    assert (strategy == "fed-loraprune") == (update.ratio > 0) == bool(update.contribution.rows)


def nan(tensors: Tensors) -> None:
    tensors[f"{FIRST}.b"] = tensors[f"{FIRST}.b"].clone()
    tensors[f"{FIRST}.b"][0, 0] = float("nan")


def ragged(tensors: Tensors) -> None:
    channels = tensors["mask.1.channels"].clone()
    channels[channels.nonzero()[0]] = False
    tensors["mask.1.channels"] = channels


def swapped(tensors: Tensors) -> None:
    """The right number of channels in every block, but one that had gone is back."""
    for index in range(3):
        channels = tensors[f"mask.{index}.channels"].clone()
        gone, present = (~channels).nonzero(), channels.nonzero()
        channels[gone[0]], channels[present[0]] = True, False
        tensors[f"mask.{index}.channels"] = channels


DAMAGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "NaN": (nan, f"{FIRST}.b holds NaN"),
    "infinity in the head": (
        lambda t: t.update({"head.score.weight": t["head.score.weight"] / 0}),
        "head.score.weight",
    ),
    "double precision": (lambda t: t.update({f"{FIRST}.b": t[f"{FIRST}.b"].double()}), "not float32"),
    "eight bits": (lambda t: t.update({f"{FIRST}.b": t[f"{FIRST}.b"].to(torch.float8_e4m3fn)}), "no message carries"),
    "complex numbers": (lambda t: t.update({"head.score.weight": t["head.score.weight"] + 0j}), "no message carries"),
    "complex importance": (
        lambda t: t.update({"importance.0.heads": t["importance.0.heads"] + 0j}),
        "importance.0.heads is torch.complex64",
    ),
    "numbers whose product is none": (
        lambda t: t.update({f"{FIRST}.b": torch.full_like(t[f"{FIRST}.b"], 1e25)}),
        f"{FIRST}.b holds numbers beyond",
    ),
    "a missing factor": (lambda t: t.pop(f"{FIRST}.a"), f"{FIRST}.a is missing"),
    "a missing head": (lambda t: t.pop("head.score.weight"), "head.score.weight is missing"),
    "a tensor too many": (lambda t: t.update({"lora.spy.a": torch.ones(1)}), "lora.spy.a was not asked for"),
    "another shape": (lambda t: t.update({f"{FIRST}.b": torch.ones(5, 4)}), f"{FIRST}.b has shape"),
    "another rank": (lambda t: t.update({f"{FIRST}.a": torch.ones(9, 32)}), f"{FIRST}.a has shape"),
    "a missing mask": (lambda t: t.pop("mask.2.heads"), "mask.2.heads is missing"),
    "a mask of numbers": (lambda t: t.update({"mask.0.heads": torch.ones(4)}), "mask.0.heads is missing or not a mask"),
    "a mask of another length": (lambda t: t.update({"mask.0.heads": torch.ones(5).bool()}), "not a mask of 4 units"),
    "a mask that keeps nothing": (lambda t: t.update({"mask.0.channels": torch.zeros(40).bool()}), "mask.0.channels"),
    "masks of ragged blocks": (ragged, "blocks of different widths"),
    "masks that bring units back": (swapped, "bring back units"),
    "missing importance": (lambda t: t.pop("importance.1.channels"), "importance.1.channels is missing"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_wrong_answer_is_refused_by_name(ordered: Any, damage: Callable[[Tensors], object], named: str) -> None:
    watched, reply = ordered()
    tensors = dict(reply.message.tensors)
    before = watched.federation.strategy.masks_of(reply.device)
    assert check(watched, reply, before=before)
    damage(tensors)
    with pytest.raises(MessageError) as refused:
        check(watched, reply, Message(reply.message.header, tensors), before)
    assert named in str(refused.value)


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "no examples": ({"examples": 0}, "examples"),
    "examples beyond counting": ({"examples": 10**400}, "examples"),
    "a loss below nothing": ({"loss_before": -1.0}, "loss_before"),
    "a loss beyond all": ({"loss_after": 1e308}, "loss_after"),
    "seconds beyond all": ({"backward_seconds": 1e308}, "backward_seconds"),
    "a loss that is none": ({"loss_after": float("nan")}, "loss_after"),
    "a loss that is a word": ({"loss_before": "low"}, "loss_before"),
    "negative seconds": ({"forward_seconds": -1.0}, "forward_seconds"),
    "a ratio of one": ({"ratio": 1.0}, "ratio"),
    "something else": ({"password": "x"}, "password"),
}


@pytest.mark.parametrize(("changes", "field"), HEADERS.values(), ids=HEADERS.keys())
def test_malformed_figures_are_refused_by_name(ordered: Any, changes: dict[str, Any], field: str) -> None:
    watched, reply = ordered()
    with pytest.raises(MessageError, match=f"'{field}'"):
        check(watched, reply, Message({**reply.message.header, **changes}, reply.message.tensors))
    missing = {key: value for key, value in reply.message.header.items() if key != "loss_after"}
    with pytest.raises(MessageError, match="'loss_after'"):
        check(watched, reply, Message(missing, reply.message.tensors))


def test_a_refused_answer_is_counted_and_the_round_goes_on(requests: Any) -> None:
    """One device sends NaN, another's training blows up; only the third counts, and the run goes on."""
    watched = Watched(requests(strategy="fedspine", cohort=SLOW, rounds=3))
    engine = watched.federation.engine
    exchange = engine.exchange

    def spoiled(jobs: Any, deadline: Any) -> Any:
        outcomes = exchange(jobs, deadline)
        first = outcomes[0]
        assert isinstance(first, Reply)
        if jobs[0].round == 1:
            tensors = dict(first.message.tensors)
            nan(tensors)
            outcomes[0] = replace(first, message=Message(first.message.header, tensors))
        return outcomes

    engine.exchange = spoiled  # type: ignore[method-assign]
    before = watched.go_on(1)
    stood = adapter_digest(watched.adapter)
    record = watched.go_on(2)[0]
    assert [device.lost for device in record.devices] == ["refused", None, None]
    assert f"{FIRST}.b holds NaN" in record.devices[0].explanation
    assert record.devices[0].compute_seconds > 0
    assert record.devices[0].loss_after is None
    assert [update.device for update in watched.updates[1]] == [device.device for device in record.devices[1:]]
    assert adapter_digest(watched.adapter) != stood
    assert all(
        bool(torch.isfinite(value).all()) for factors in watched.adapter.values() for value in (factors.a, factors.b)
    )
    last = watched.go_on(3)[0]
    assert all(device.lost is None for device in last.devices), "who was refused takes part again"
    assert before[0].round == 0


def test_a_run_whose_every_training_blows_up_goes_on_and_says_so(requests: Any) -> None:
    watched = Watched(requests(strategy="fedit", learning_rate=1e30, rounds=2))
    start = adapter_digest(watched.adapter), digest(dict(watched.federation.strategy.model().head))
    for record in watched.go_on(2):
        assert {device.lost for device in record.devices} == {"refused"}
        assert record.evaluation is not None
    assert (adapter_digest(watched.adapter), digest(dict(watched.federation.strategy.model().head))) == start
