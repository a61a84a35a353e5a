from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import classifier, recipe
from sums import digest
from torch import Tensor

from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.errors import MessageError
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.device import (
    Device,
    DeviceMemory,
    importance_from,
    importance_tensors,
    mask_tensors,
    masks_from,
)
from spinecli.federation.client.handle import TRAIN, handle
from spinecli.federation.client.local_pruning import Importance, UnitCounts, narrowed
from spinecli.federation.client.wire import adapter_from, adapter_tensors, head_tensors, outputs_tensors, shared_a
from spinecli.federation.messages import Message
from spinecli.federation.request import FederatedRequest
from spinecli.federation.run import set_up
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.lora.factors import Adapter, Factors, empty_b

RANK = 4


@dataclass(eq=False)
class Bench:
    """One device, and a server's side that sends it what it last accepted."""

    request: FederatedRequest
    seed: int = 0
    acknowledged: int | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        federation = set_up(self.request)
        self.base: BaseModel = federation.base
        self.spec = self.request.fleet.devices[0]
        self.meter = VirtualMeter()
        self.device = Device(
            self.spec.name,
            self.base,
            federation.setting.costs,
            self.request.train,
            self.request.parts[0],
            DeviceMemory(),
            self.meter,
        )
        self.tensors = {**adapter_tensors(self.fresh()), **head_tensors(self.base.head())}

    def fresh(self) -> Adapter:
        return {
            name: Factors(shared_a(self.seed, name, RANK, d_in), empty_b(d_out, RANK))
            for name, (d_out, d_in) in self.base.target_shapes().items()
        }

    def train(
        self, number: int, *, tensors: Mapping[str, Tensor] | None = None, ranks: list[int] | None = None, **order: Any
    ) -> Message:
        header: dict[str, Any] = {
            "round": number,
            "seed": self.seed,
            "acknowledged": self.acknowledged,
            "ranks": ranks or [RANK] * self.base.checkpoint.blocks,
            "scale": 2.0,
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "clip_norm": 1.0,
            **order,
        }
        self.meter.begin(conditions(self.spec, self.seed, number))
        return handle(TRAIN, Message(header, self.tensors if tensors is None else tensors), self.device)

    def masks_in(self, reply: Message) -> Masks:
        return masks_from(dict(reply.tensors), self.base.checkpoint.blocks)

    def accept(self, number: int, reply: Message) -> None:
        self.acknowledged = number
        self.tensors = {name: value for name, value in reply.tensors.items() if name.startswith(("lora.", "head."))}


PRUNING: dict[str, Any] = {"target": 0.3, "final": 0.4, "interval": 2, "score": "lora"}


@pytest.mark.parametrize("changes", [{}, {"pruning": PRUNING}], ids=["plain", "pruning"])
@pytest.mark.parametrize("made", [recipe("llama", grouped=True), classifier("bert")], ids=["llama", "bert"])
def test_the_same_order_gives_the_same_bytes_whatever_the_global_generator(
    requests: Any, made: Any, changes: dict[str, Any]
) -> None:
    answers = []
    for elsewhere in (0, 1):
        bench = Bench(requests(made))
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        answers.append(bench.train(3, **changes).pack())
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert answers[0] == answers[1]
    other = Bench(requests(made)).train(4, **changes).pack()
    assert other != answers[0]


def test_training_learns_the_devices_own_data(requests: Any) -> None:
    bench = Bench(requests())
    reply = bench.train(0, steps=60)
    assert reply.header["examples"] == len(bench.request.parts[0])
    assert reply.header["loss_after"] < 0.7 * reply.header["loss_before"]  # type: ignore[operator]
    assert reply.tensors.keys() == bench.tensors.keys()
    assert all(
        not torch.equal(value, bench.tensors[name]) for name, value in reply.tensors.items() if "bias" not in name
    )


def test_what_was_sent_is_not_written_to(requests: Any) -> None:
    bench = Bench(requests())
    before = digest(bench.tensors)
    bench.train(0, pruning=PRUNING)
    assert digest(bench.tensors) == before


def test_a_shared_a_neither_travels_nor_changes(requests: Any) -> None:
    bench = Bench(requests())
    sent = {**outputs_tensors(bench.fresh()), **head_tensors(bench.base.head())}
    reply = bench.train(0, tensors=sent, shared_a=True)
    assert reply.tensors.keys() == sent.keys()
    assert not any(name.endswith(".a") for name in reply.tensors)
    whole = Bench(requests())
    frozen = whole.train(0, tensors=sent, shared_a=True, learning_rate=1e-2)
    assert frozen.pack() == reply.pack()


def test_gradients_are_clipped(requests: Any) -> None:
    """Adam divides the scale of its gradients out again, except where some steps are clipped and others are not."""
    free = Bench(requests()).train(0, clip_norm=1e9)
    clipped = Bench(requests()).train(0, clip_norm=1e-3)
    assert digest(free.tensors) != digest(clipped.tensors)


def test_a_training_that_blew_up_says_so_and_leaves_the_model(requests: Any) -> None:
    bench = Bench(requests())
    reply = bench.train(0, learning_rate=1e30)
    assert any(not bool(torch.isfinite(value).all()) for value in reply.tensors.values())
    again = Bench(requests()).train(0)
    assert bench.train(0).pack() == again.pack()


BAD_ORDERS: dict[str, dict[str, Any]] = {
    "steps": {"steps": 0},
    "learning_rate": {"learning_rate": float("nan")},
    "pruning.target": {"pruning": {**PRUNING, "target": 1.0}},
    "pruning.score": {"pruning": {**PRUNING, "score": "guess"}},
    "extra": {"extra": 1},
}


@pytest.mark.parametrize(("place", "changes"), BAD_ORDERS.items(), ids=BAD_ORDERS.keys())
def test_a_malformed_order_is_refused_by_name(requests: Any, place: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match=place):
        Bench(requests()).train(0, **changes)


def test_unknown_requests_and_numbers_that_are_none_are_refused(requests: Any) -> None:
    bench = Bench(requests())
    with pytest.raises(MessageError, match="dance"):
        handle("dance", Message({}, {}), bench.device)
    name = next(iter(bench.tensors))
    with pytest.raises(MessageError, match=name):
        bench.train(0, tensors={**bench.tensors, name: torch.full((1,), float("nan"))})


DENSE = BlockShape(4, 2, 8, 10)


def remembered(number: int, channels: int) -> tuple[DeviceMemory, Masks, list[Importance]]:
    memory = DeviceMemory()
    importance = [Importance(torch.rand(4), torch.rand(10)) for _ in range(2)]
    masks = narrowed(Masks.full((DENSE,) * 2), UnitCounts(1, channels), importance, DENSE)
    memory.remember(number, masks, importance)
    return memory, masks, importance


def same(one: Masks, other: Masks) -> bool:
    pairs = zip(mask_tensors(one).values(), mask_tensors(other).values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_a_cut_holds_only_if_the_server_has_heard_of_it() -> None:
    for acknowledged, holds in ((4, True), (3, False), (None, False), (5, False)):
        memory, masks, importance = remembered(4, 6)
        assert same(memory.masks((DENSE,) * 2), Masks.full((DENSE,) * 2)), "what is pending does not count yet"
        memory.settle(acknowledged)
        assert same(memory.masks((DENSE,) * 2), masks if holds else Masks.full((DENSE,) * 2))
        if holds:
            assert torch.equal(memory.importance(2, DENSE)[1].channels, importance[1].channels)
        else:
            assert not bool(memory.importance(2, DENSE)[1].channels.any())


def test_a_dropped_cut_leaves_the_one_before_it() -> None:
    memory, masks, importance = remembered(1, 6)
    memory.settle(1)
    memory.remember(5, narrowed(masks, UnitCounts(1, 3), importance, DENSE), importance)
    memory.settle(1)
    assert same(memory.masks((DENSE,) * 2), masks)
    memory.settle(1)
    assert same(memory.masks((DENSE,) * 2), masks), "settling twice changes nothing"


def test_a_device_whose_answer_was_lost_starts_its_next_round_where_the_server_thinks_it_is(requests: Any) -> None:
    bench = Bench(requests())
    first = bench.train(0, pruning=PRUNING)
    assert first.header["ratio"] > 0  # type: ignore[operator]
    again = bench.train(1, pruning={**PRUNING, "target": 0.0})  # the server has not heard, and sends full factors
    assert again.header["ratio"] == 0
    assert adapter_from(again.tensors).keys() == bench.base.target_shapes().keys()
    bench.accept(1, again)
    third = bench.train(2, pruning=PRUNING)
    bench.accept(2, third)
    fourth = bench.train(3, pruning={**PRUNING, "target": 0.0})
    assert fourth.header["ratio"] == third.header["ratio"]
    assert same(bench.masks_in(fourth), bench.masks_in(third))


def sent_importance(bench: Bench, seed: int = 0) -> list[Importance]:
    generator = torch.Generator().manual_seed(seed)
    dense = bench.base.cuts.dense
    return [
        Importance(torch.rand(dense.heads, generator=generator), torch.rand(dense.channels, generator=generator))
        for _ in range(bench.base.checkpoint.blocks)
    ]


CUT_FIRST: dict[str, Any] = {**PRUNING, "cut_first": True}


@pytest.mark.parametrize("score", ["lora", "salience"])
def test_what_is_cut_first_is_chosen_by_the_importance_that_was_sent(requests: Any, score: str) -> None:
    bench = Bench(requests())
    cuts, importance = bench.base.cuts, sent_importance(bench)
    order = {**CUT_FIRST, "score": score}
    reply = bench.train(0, tensors={**bench.tensors, **importance_tensors(importance)}, pruning=order)
    full = Masks.full(bench.base.checkpoint.shapes)
    widths = cuts.widths_at(0.3, cuts.widths_of(full), cuts.widths_at(0.4))
    assert reply.header["ratio"] == cuts.ratio_of(widths) > 0
    assert same(bench.masks_in(reply), narrowed(full, widths, importance, cuts.dense))
    reported = importance_from(reply.tensors, len(importance))
    gone = ~bench.masks_in(reply).blocks[0].channels
    assert torch.equal(reported[0].channels[gone], importance[0].channels[gone]), "what is gone is not measured again"
    assert not torch.equal(reported[0].channels[~gone], importance[0].channels[~gone])
    assert not any("importance" in name for name in bench.device.memory.tensors), "the server sends it the next time"


def test_every_step_after_a_first_cut_is_one_of_the_smaller_model(requests: Any) -> None:
    first, last, standing = (Bench(requests()) for _ in range(3))
    sent = {**first.tensors, **importance_tensors(sent_importance(first))}
    reply = first.train(0, tensors=sent, pruning=CUT_FIRST)
    last.train(0, pruning={**PRUNING, "interval": 6})
    assert first.meter.total < last.meter.total
    standing.device.memory.tensors = dict(first.device.memory.tensors)
    standing.accept(0, reply)
    standing.train(0, pruning={**PRUNING, "target": 0.0})
    assert first.meter.total == pytest.approx(standing.meter.total), "as if it had been cut before the round"


def test_importance_that_lacks_a_block_or_has_another_shape_is_refused_by_name(requests: Any) -> None:
    bench = Bench(requests())
    sent = {**bench.tensors, **importance_tensors(sent_importance(bench))}
    for name, changed in (("importance.1.channels", None), ("importance.0.heads", torch.zeros(1))):
        tensors = {key: value for key, value in sent.items() if key != name}
        with pytest.raises(MessageError, match=name):
            bench.train(0, tensors=tensors if changed is None else {**tensors, name: changed}, pruning=CUT_FIRST)


def test_the_loss_is_told_at_both_ends(requests: Any) -> None:
    bench = Bench(requests())
    reply = bench.train(0, steps=1)
    assert reply.header["loss_before"] == reply.header["loss_after"]
    assert {"forward_seconds", "backward_seconds"} <= reply.header.keys()
    assert bench.meter.total == pytest.approx(
        reply.header["forward_seconds"] + reply.header["backward_seconds"]  # type: ignore[operator]
    )
