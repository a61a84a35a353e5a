from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare")

import psutil
from echo_fleet import NAMES, Fleet, all_jobs, eventually, reason

from spinecli.federation.engines.nvflare.certificates import certify
from spinecli.federation.engines.nvflare.driver import CONNECTIONS_OF_ONE, InTurn, ServerDriver
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.engines.nvflare.handshakes import Handshakes, peer_of

MIB, LONGEST = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("ipv4:10.77.0.2:50000", ("10.77.0.2", 50000)),
        ("ipv6:%5B::1%5D:50001", ("::1", 50001)),
        ("ipv6:%5B::ffff:10.77.0.2%5D:50002", ("10.77.0.2", 50002)),
        ("ipv6:%5Bfe80::1%25eth0%5D:50003", ("fe80::1", 50003)),
    ],
)
def test_peers_have_one_name_however_they_are_written(name: str, peer: tuple[str, int]) -> None:
    assert peer_of(name) == peer


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged."""
    logger, said = logging.getLogger("nvflare.spine"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def test_who_leaves_without_having_come_in_is_told_once_by_address(lines: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        watched = Handshakes(place[1])

        def knock(address: str) -> tuple[socket.socket, socket.socket]:
            outside = socket.create_connection(place, source_address=(address, 0))
            inside, _ = listener.accept()
            watched.began()
            return outside, inside

        friend = knock("127.0.0.2")
        watched.admitted(f"ipv4:127.0.0.2:{friend[0].getsockname()[1]}")
        for address in ("127.0.0.3", "127.0.0.4", "127.0.0.3"):
            for end in knock(address):
                end.close()
        eventually(lambda: len(lines) >= 2)
        for end in friend:
            end.close()
        late = knock("127.0.0.5")
        for end in late:
            end.close()
        eventually(lambda: len(lines) >= 3)
        watched.close()
    assert sorted(line.split()[4].rstrip(":") for line in lines) == ["127.0.0.3", "127.0.0.4", "127.0.0.5"]
    assert all(line.startswith("refused a connection from ") for line in lines)


def test_a_frame_is_dealt_with_before_the_next_is_taken() -> None:
    dealt: list[int] = []

    def deal(connection: object, frame: int) -> None:
        time.sleep(0.01)
        dealt.append(frame)

    manager = SimpleNamespace(process_frame_task=deal)
    receiver = InTurn(SimpleNamespace(conn_manager=manager, conn=SimpleNamespace(last_activity=0.0)))
    for number in range(5):
        receiver.process_frame(number)
        assert dealt == list(range(number + 1))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    place = tmp_path_factory.mktemp("door")
    certify(place / "own", NAMES, ["127.0.0.1"])
    made = Fleet(place, place / "own")
    made.gather(made.serve())
    yield made
    made.end()


@pytest.fixture
def engine(fleet: Fleet) -> NvflareEngine:
    return fleet.engines[0]


@pytest.mark.slow
def test_strangers_are_in_the_log_once_and_the_run_goes_on(fleet: Fleet, engine: NvflareEngine) -> None:
    log = fleet.folder / "server.txt"
    assert "refused a connection" not in log.read_text()
    place = ("127.0.0.1", fleet.port)
    for address in ("127.0.0.6", "127.0.0.6", "127.0.0.7"):
        with socket.create_connection(place, source_address=(address, 0)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.settimeout(60)
            while stranger.recv(1000):
                pass
    nobody = fleet.start("slow-00", "none")
    eventually(lambda: all(f"from {name}:" in log.read_text() for name in ("127.0.0.6", "127.0.0.7", "127.0.0.1")))
    assert [reason(outcome) for outcome in engine.exchange(all_jobs(), 20.0)] == ["answered"] * 3
    nobody.kill()
    assert [log.read_text().count(f"refused a connection from 127.0.0.{last}:") for last in (1, 6, 7)] == [1, 1, 1]


@pytest.mark.slow
def test_grpc_is_told_how_long_a_message_may_be(engine: NvflareEngine) -> None:
    options = dict(map(tuple, ServerDriver().options))
    assert options["grpc.max_receive_message_length"] == LONGEST + MIB
    assert engine._line._cell.max_msg_size == LONGEST


@pytest.mark.slow
def test_a_device_that_floods_waits_and_does_not_fill_the_memory(fleet: Fleet, engine: NvflareEngine) -> None:
    log = fleet.folder / "server.txt"
    server = psutil.Process()
    with engine._changed:  # the server is busy, and deals with nothing
        before = server.memory_info().rss
        flood = fleet.start("slow-00", "flood")
        assert flood.stdout is not None
        assert flood.stdout.readline() == "sent\n"
        most, limit = 0, time.monotonic() + 8.0
        while time.monotonic() < limit:
            most = max(most, server.memory_info().rss - before)
            time.sleep(0.1)
    flood.kill()
    assert most < 64 * MIB
    eventually(lambda: [reason(outcome) for outcome in engine.exchange(all_jobs(), 20.0)] == ["answered"] * 3)
    assert "refused a message" not in log.read_text()


@pytest.mark.slow
def test_a_certificate_has_a_few_connections_and_no_more(fleet: Fleet, engine: NvflareEngine) -> None:
    log = fleet.folder / "server.txt"
    crowd = fleet.start("slow-00", "crowd")
    told = f"slow-00 has {CONNECTIONS_OF_ONE} connections already"
    eventually(lambda: told in log.read_text())
    busy = sum(thread.name == "grpc_reader" for thread in threading.enumerate())
    assert busy <= len(NAMES) - 1 + CONNECTIONS_OF_ONE
    assert [reason(outcome) for outcome in engine.exchange(all_jobs(), 20.0)] == ["answered"] * 3
    crowd.kill()
