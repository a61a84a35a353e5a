from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvflare")

from echo_fleet import NAMES, SOON, TIMEOUTS, Fleet, all_jobs, eventually, job, listeners, reason

from spinecli.federation.engine import Job, Lost, Reply
from spinecli.federation.engines.nvflare.certificates import certify
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.messages import Message

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("identities")
    certify(place / "own", NAMES, ["127.0.0.1"])
    certify(place / "foreign", NAMES, ["127.0.0.1"])
    return place


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, identities: Path) -> Iterator[Fleet]:
    """A fleet that every test leaves as it found it: each device answers."""
    made = Fleet(tmp_path_factory.mktemp("shared"), identities / "own")
    made.gather(made.serve())
    yield made
    made.end()


@pytest.fixture
def engine(shared: Fleet) -> Iterator[NvflareEngine]:
    (served,) = shared.engines
    yield served
    eventually(lambda: [reason(outcome) for outcome in served.exchange(all_jobs(), 20.0)] == ["answered"] * 3)


def test_answers_come_in_the_order_of_the_jobs_with_their_bytes_and_times(engine: NvflareEngine) -> None:
    assert [node.name for node in engine.nodes()] == list(NAMES)
    assert {(node.device_class, node.examples, node.label_counts) for node in engine.nodes()} == {("echo", 3, (1, 2))}
    jobs = [job("fast-00"), job("slow-00", "sleep 0.5"), job("slow-01")]
    began = engine.now()
    outcomes = engine.exchange(jobs, None)
    ended = engine.now()
    for asked, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, Reply)
        assert outcome.device == asked.device
        assert outcome.message.header == {"to": asked.device}
        assert torch.equal(outcome.message.tensors["value"], torch.arange(100.0))
        timing = outcome.timing
        assert began <= timing.sent <= timing.started <= timing.finished <= timing.arrived <= ended
        assert timing.bytes_down == timing.bytes_up == len(asked.message.pack())
    slept = outcomes[1]
    assert isinstance(slept, Reply)
    assert 0.4 < slept.timing.compute_seconds < slept.timing.seconds < 5
    # all at once, not one after another
    assert len({round(outcome.timing.sent, 1) for outcome in outcomes if isinstance(outcome, Reply)}) <= 2


def test_who_is_late_is_given_up_and_its_late_answer_changes_nothing(engine: NvflareEngine) -> None:
    began = time.monotonic()
    outcomes = engine.exchange([job("slow-00", "sleep 6"), job("slow-01"), job("fast-00")], 3.0)
    assert 2.9 < time.monotonic() - began < 5
    assert [reason(outcome) for outcome in outcomes] == ["late", "answered", "answered"]
    late = outcomes[0]
    assert isinstance(late, Lost)
    assert late.seconds == 3.0
    assert late.bytes_down > 0
    asked = Job("slow-00", "echo", 1, Message({"second": True}, {}))
    (outcome,) = engine.exchange([asked], 60.0)
    assert isinstance(outcome, Reply)
    assert outcome.message.header == {"second": True}


def test_a_training_process_that_is_killed_costs_its_round_alone(engine: NvflareEngine) -> None:
    outcomes = engine.exchange([job("slow-00", "die"), job("slow-01"), job("fast-00")], None)
    assert [reason(outcome) for outcome in outcomes] == ["failed", "answered", "answered"]
    assert isinstance(outcomes[0], Lost)
    assert "SIGKILL" in outcomes[0].explanation
    assert [reason(outcome) for outcome in engine.exchange([job(name) for name in NAMES], 20.0)] == ["answered"] * 3


@pytest.mark.parametrize(
    ("do", "expected"), [("garbage", "refused"), ("cut", "refused"), ("fail", "failed"), ("echo", "answered")]
)
def test_an_answer_that_is_none_is_refused_and_the_device_stays(engine: NvflareEngine, do: str, expected: str) -> None:
    (outcome, other) = engine.exchange([job("slow-00", do), job("slow-01")], 10.0)
    assert (reason(outcome), reason(other)) == (expected, "answered")
    assert reason(engine.exchange([job("slow-00")], 10.0)[0]) == "answered"


def test_a_site_that_is_killed_is_lost_and_one_that_is_started_again_is_back(
    shared: Fleet, engine: NvflareEngine
) -> None:
    shared.newest("slow-00").kill()
    outcomes = engine.exchange(all_jobs(), None)
    assert [reason(outcome) for outcome in outcomes] == ["failed", "answered", "answered"]
    assert isinstance(outcomes[0], Lost)
    assert outcomes[0].seconds >= TIMEOUTS.gone - 1
    shared.start("slow-00")
    eventually(lambda: reason(engine.exchange([job("slow-00")], 5.0)[0]) == "answered")
    assert [node.name for node in engine.nodes()] == list(NAMES)


def test_a_stopped_site_is_late_and_goes_on_when_it_is_continued(shared: Fleet, engine: NvflareEngine) -> None:
    site = shared.newest("slow-01")
    site.send_signal(signal.SIGSTOP)
    outcomes = engine.exchange(all_jobs(), 4.0)
    assert [reason(outcome) for outcome in outcomes] == ["answered", "late", "answered"]
    site.send_signal(signal.SIGCONT)
    assert reason(engine.exchange([job("slow-01")], 30.0)[0]) == "answered"


def test_a_second_process_of_a_name_takes_its_place(shared: Fleet, engine: NvflareEngine) -> None:
    first = shared.newest("slow-00")
    second = shared.start("slow-00")
    assert first.stdout is not None
    assert "another process has taken the name slow-00" in first.stdout.readline()
    assert first.wait(SOON) == 0
    eventually(lambda: reason(engine.exchange([job("slow-00")], 5.0)[0]) == "answered")
    assert second.poll() is None


def test_strangers_are_refused_and_the_run_is_undisturbed(
    shared: Fleet, engine: NvflareEngine, identities: Path
) -> None:
    log = shared.folder / "server.txt"
    rightful = shared.newest("slow-00")
    comings = log.read_text().count("slow-00 has come")
    strangers = [
        shared.start("slow-00", str(identities / "foreign" / "slow-00")),
        shared.start("slow-00", "fast-00"),
        shared.start("slow-00", "none"),
    ]
    place = ("127.0.0.1", shared.port)
    with socket.create_connection(place) as silent, socket.create_connection(place) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        eventually(lambda: "authenticated as 'fast-00' but claimed endpoint 'slow-00." in log.read_text())
        assert [reason(outcome) for outcome in engine.exchange(all_jobs(), 20.0)] == ["answered"] * 3
        assert silent.fileno() > 0
    assert rightful.poll() is None
    assert log.read_text().count("slow-00 has come") == comings
    for stranger in strangers:
        stranger.kill()


def test_the_server_passes_nothing_on_between_devices_and_decodes_nothing(shared: Fleet, engine: NvflareEngine) -> None:
    log = shared.folder / "server.txt"
    rogue = shared.start("slow-00", "rogue")
    eventually(lambda: log.read_text().count("refused a message of slow-00.rogue") >= 3)
    assert rogue.wait(SOON) == 0
    assert "refused a message of server" not in log.read_text()


def test_nothing_listens_beyond_the_named_address(shared: Fleet, engine: NvflareEngine) -> None:
    assert listeners(shared.port) == {"127.0.0.1"}
