from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_connection import http_request_response

from spinecli.errors import FederationError, MessageError
from spinecli.federation import messages
from spinecli.federation.engine import Job, Lost, Reply
from spinecli.federation.engines.envelope import (
    ANSWER,
    FAILED,
    Answer,
    Failed,
    JobHeader,
    Ready,
    decode_envelope,
    encode_envelope,
)
from spinecli.federation.engines.flower.engine import FlowerEngine
from spinecli.federation.engines.flower.link import Link
from spinecli.federation.engines.flower.payload import ENROLLED, Enrolled, packed, unpacked

TOKENS = {"one": "secret of one", "two": "secret of two"}
SOON = 60.0

Do = Callable[[JobHeader, bytes], RecordDict]


def echo(header: JobHeader, blob: bytes) -> RecordDict:
    return packed(ANSWER, encode_envelope(Answer(job=header.job, seconds=0.0), blob))


@dataclass
class Fleet:
    """Devices of one process, that talk to a link over HTTP as SuperNodes do."""

    link: Link
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)

    def join(self, name: str, do: Do = echo, token: str | None = None) -> None:
        enrolled = Enrolled(
            device=name,
            token=TOKENS[name] if token is None else token,
            ready=Ready(device_class="echo", memory_bytes=1, examples=3, label_counts=(1, 2)),
        )
        thread = threading.Thread(target=self._serve, args=(enrolled, do), daemon=True)
        self.threads.append(thread)
        thread.start()

    def _serve(self, enrolled: Enrolled, do: Do) -> None:
        with http_request_response(f"127.0.0.1:{self.link.port}", insecure=True) as connection:
            _, receive, send, _, _, pull, push, confirm = connection
            while not self.stop.wait(0.02):
                if (received := receive()) is None:
                    continue
                told, tree = received
                run = told.metadata.run_id
                contents = {part.object_id: pull(run, part.object_id) for part in iterate_object_tree(tree)}
                content = inflate_object_from_contents(tree.object_id, contents).content
                confirm(run, tree.object_id)
                topic, envelope = unpacked(content)
                query = topic == ENROLLED
                reply = Message(
                    packed(ENROLLED, encode_envelope(enrolled)) if query else do(*decode_envelope(JobHeader, envelope)),
                    reply_to=told,
                )
                reply.metadata.__dict__["_message_id"] = reply.object_id
                missing, session = send(reply, get_object_tree(reply), 0.0)
                objects = get_all_nested_objects(reply)
                for each in missing:
                    push(run, session, each, objects[each].deflate())

    def engine(self) -> FlowerEngine:
        engine = FlowerEngine(TOKENS, self.link, self.ended.get)
        limit = time.monotonic() + SOON

        def look(status: object) -> None:
            assert time.monotonic() < limit

        engine.wait_for_all(look)
        return engine


@contextmanager
def a_fleet() -> Iterator[Fleet]:
    made = Fleet(Link("nowhere:app"))
    try:
        yield made
    finally:
        made.stop.set()
        for thread in made.threads:
            thread.join(SOON)
        made.link.close()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with a_fleet() as made:
        yield made


def job(device: str, size: int = 100) -> Job:
    return Job(device, "echo", 0, messages.Message({"to": device}, {"value": torch.arange(size, dtype=torch.bfloat16)}))


def why(outcome: Reply | Lost) -> str:
    return outcome.explanation if isinstance(outcome, Lost) else "answered"


def test_answers_come_in_the_order_of_the_jobs(fleet: Fleet) -> None:
    fleet.join("two")
    fleet.join("one")
    engine = fleet.engine()
    assert [node.name for node in engine.nodes()] == ["one", "two"]
    assert {(node.device_class, node.examples, node.label_counts) for node in engine.nodes()} == {("echo", 3, (1, 2))}
    for _ in range(3):
        began = engine.now()
        outcomes = engine.exchange([job("two", 1 << 20), job("one")], None)
        for outcome, asked in zip(outcomes, [job("two", 1 << 20), job("one")], strict=True):
            assert isinstance(outcome, Reply)
            assert outcome.device == asked.device
            assert outcome.message.header == asked.message.header
            assert torch.equal(outcome.message.tensors["value"], asked.message.tensors["value"])
            timing = outcome.timing
            assert began <= timing.sent <= timing.started <= timing.finished <= timing.arrived <= engine.now()
            assert timing.bytes_down == timing.bytes_up == len(asked.message.pack())
    state = fleet.link._state
    assert (state.num_message_ins(), state.num_message_res()) == (0, 0)
    assert not state.object_store.store


def test_who_is_late_is_given_up_and_its_late_answer_changes_nothing(fleet: Fleet) -> None:
    go = threading.Event()

    def when_told(header: JobHeader, blob: bytes) -> RecordDict:
        go.wait(SOON)
        return echo(header, blob)

    fleet.join("one", when_told)
    fleet.join("two")
    engine = fleet.engine()
    late, answered = engine.exchange([job("one"), job("two")], 2.0)
    assert isinstance(late, Lost)
    assert (late.reason, late.seconds) == ("late", 2.0)
    assert why(answered) == "answered"
    go.set()
    assert [why(outcome) for outcome in engine.exchange([job("one")], SOON)] == ["answered"]


def failing(header: JobHeader, blob: bytes) -> RecordDict:
    return packed(FAILED, encode_envelope(Failed(job=header.job, explanation="no such thing")))


def another(header: JobHeader, blob: bytes) -> RecordDict:
    return packed(ANSWER, encode_envelope(Answer(job=header.job + 1, seconds=0.0), blob))


def cut(header: JobHeader, blob: bytes) -> RecordDict:
    return packed(ANSWER, encode_envelope(Answer(job=header.job, seconds=0.0), blob[:-3]))


def garbage(header: JobHeader, blob: bytes) -> RecordDict:
    return packed(ANSWER, b"garbage")


def foreign(header: JobHeader, blob: bytes) -> RecordDict:
    return RecordDict({"metrics": MetricRecord({"loss": 1.0})})


@pytest.mark.parametrize(
    ("do", "reason", "explanation"),
    [
        (failing, "failed", "no such thing"),
        (another, "failed", "something else than it was asked"),
        (cut, "refused", "truncated"),
        (garbage, "failed", "truncated"),
        (foreign, "failed", "does not contain exactly one envelope"),
    ],
)
def test_an_answer_that_is_none_is_the_loss_of_its_own_device(
    fleet: Fleet, do: Do, reason: str, explanation: str
) -> None:
    fleet.join("one", do)
    fleet.join("two")
    lost, answered = fleet.engine().exchange([job("one"), job("two")], None)
    assert isinstance(lost, Lost)
    assert (lost.device, lost.reason) == ("one", reason)
    assert explanation in lost.explanation
    assert why(answered) == "answered"


def test_a_device_whose_process_has_ended_is_not_waited_for(fleet: Fleet) -> None:
    def until_the_end(header: JobHeader, blob: bytes) -> RecordDict:
        fleet.stop.wait(SOON)
        return echo(header, blob)

    fleet.join("one", until_the_end)
    fleet.join("two")
    engine = fleet.engine()
    timer = threading.Timer(0.5, fleet.ended.__setitem__, ("one", "it was killed"))
    timer.start()
    outcomes = engine.exchange([job("one"), job("two")], None)
    assert [why(outcome) for outcome in outcomes] == ["it was killed", "answered"]
    assert [why(outcome) for outcome in engine.exchange([job("one"), job("two")], None)] == [
        "it was killed",
        "answered",
    ]
    fleet.ended["two"] = "it was killed, too"
    with pytest.raises(FederationError, match="--resume"):
        engine.exchange([job("one"), job("two")], None)


def test_nobody_takes_part_in_the_name_of_a_device(fleet: Fleet) -> None:
    fleet.join("one", token="guessed")
    fleet.join("one")
    fleet.join("two", token="")
    fleet.join("two")
    engine = fleet.engine()
    assert [why(outcome) for outcome in engine.exchange([job("one"), job("two")], None)] == ["answered"] * 2


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/control/list-nodes", "/v1/runtime/acquire-task", "/v1/fleet/pull-messages"]
)
def test_strangers_are_refused(fleet: Fleet, path: str) -> None:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{fleet.link.port}{path}", data=b"", headers={"Content-Type": PROTOBUF_MEDIA_TYPE}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    assert refused.value.code == (401 if "fleet" in path else 404)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"spine": ConfigRecord({"a": 1})}),
        RecordDict({"spine": ArrayRecord()}),
        RecordDict({"spine": ArrayRecord({"a": Array(torch.zeros(3).numpy())})}),
        RecordDict({"spine": ArrayRecord({"a": Array("uint8", (4,), "envelope", b"abc")})}),
        RecordDict({"spine": ArrayRecord({"a": Array("uint8", (3,), "envelope", b"abc")}), "more": ConfigRecord()}),
    ],
)
def test_other_content_is_refused(content: RecordDict) -> None:
    with pytest.raises(MessageError):
        unpacked(content)


def test_what_is_packed_is_unpacked() -> None:
    assert unpacked(packed("topic", b"bytes")) == ("topic", b"bytes")
    assert unpacked(packed("topic", b"")) == ("topic", b"")


def test_flower_reports_nothing_asks_nothing_and_installs_nothing() -> None:
    script = (
        "import os, spinecli.remote.launch_flower; from flwr.supercore import telemetry; "
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_DISABLE_UPDATE_CHECK'], "
        "os.environ['FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION'])"
    )
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1"}
    answer = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["0", "1", "1"]
