from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from echo_fleet import NAMES, SOON, Fleet, all_jobs, eventually, job, listeners, reason, wait_for
from small_federations import fleet_text

from spinecli.errors import FederationError
from spinecli.federation.engine import Reply
from spinecli.federation.engines.enrolment_status import EnrolmentStatus
from spinecli.federation.engines.loopback import free_port
from spinecli.federation.engines.nvflare.certificates import certify, read_identity
from spinecli.federation.engines.nvflare.connection import Address
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.simulation.fleet import load_fleet
from spinecli.federation.simulation.virtual_clock import VirtualClock

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("identities")
    certify(place / "own", NAMES, ["127.0.0.1"])
    return place


@pytest.fixture
def fleet(tmp_path: Path, identities: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, identities / "own")
    yield made
    made.end()


def test_a_run_without_any_device_ends(fleet: Fleet) -> None:
    engine = fleet.serve()
    for site in fleet.gather(engine):
        site.kill()
    with pytest.raises(FederationError, match="--resume"):
        engine.exchange(all_jobs(), None)


def test_devices_come_back_to_a_server_that_is_started_anew(fleet: Fleet) -> None:
    engine = fleet.serve()
    fleet.gather(engine)
    assert reason(engine.exchange([job("slow-00")], 10.0)[0]) == "answered"
    kept = engine.snapshot()
    fleet.engines.clear()
    engine._line.close()
    again = fleet.serve()
    wait_for(again)
    again.restore(kept)
    assert isinstance(kept.values["clock"], float)
    assert kept.values["clock"] <= again.now() < kept.values["clock"] + 5
    assert again.snapshot().values["run"] == kept.values["run"]
    assert [reason(outcome) for outcome in again.exchange([job(name) for name in NAMES], 10.0)] == ["answered"] * 3


def test_on_a_fleets_clock_seconds_are_those_of_the_fleet(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(fleet_text())
    devices = load_fleet(str(path))
    engine = fleet.serve(clock=VirtualClock(devices, 3))
    fleet.gather(engine)
    specs = {spec.name: spec for spec in devices.devices}
    for number in range(3):
        start = engine.now()
        outcomes = engine.exchange([job(name, number=number) for name in NAMES], None)
        for name, outcome in zip(NAMES, outcomes, strict=True):
            assert isinstance(outcome, Reply)
            current = conditions(specs[name], 3, number)
            down = current.download_seconds(outcome.timing.bytes_down)
            assert outcome.timing.started == start + down
            assert outcome.timing.finished == start + down + current.compute_seconds(1e6)
        assert engine.now() == max(outcome.timing.arrived for outcome in outcomes if isinstance(outcome, Reply))


def test_a_port_that_is_taken_is_named(fleet: Fleet) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", fleet.port))
        taken.listen()
        with pytest.raises(FederationError, match=str(fleet.port)):
            fleet.serve()


def test_the_port_is_free_after_closing(fleet: Fleet) -> None:
    engine = fleet.serve()
    eventually(lambda: bool(listeners(fleet.port)))
    fleet.engines.clear()
    engine.close()
    assert not listeners(fleet.port)
    Address("127.0.0.1", fleet.port).require_free()


def test_a_device_that_cannot_load_says_so(fleet: Fleet) -> None:
    engine = fleet.serve(b"impossible")
    fleet.start("slow-00")

    def look(status: EnrolmentStatus) -> None:
        if status.troubles:
            raise FederationError(status.troubles["slow-00"])

    with pytest.raises(FederationError, match="this cannot be loaded"):
        engine.wait_for_all(look)


def test_a_device_that_the_run_does_not_expect_is_sent_away(fleet: Fleet) -> None:
    fleet.serve(names=["slow-01"])
    site = fleet.start("slow-00")
    assert site.stdout is not None
    assert "the run does not expect a device slow-00" in site.stdout.readline()
    assert site.wait(SOON) == 0


def test_a_device_cannot_pass_for_the_server(tmp_path: Path) -> None:
    names = ["localhost", "alpha"]
    certify(tmp_path / "keys", names, ["localhost"])
    for shown, believed in (("server", True), ("localhost", False)):
        port = free_port()
        folder = Fleet(tmp_path, tmp_path / "keys")
        folder.port = port
        address = Address("localhost", port)
        engine = NvflareEngine(["alpha"], b"welcome", address, read_identity(tmp_path / "keys" / shown))
        site = folder.start("alpha", host="localhost")
        try:
            limit = time.monotonic() + (SOON if believed else 15.0)
            with pytest.raises(TimeoutError) if not believed else nullcontext():
                engine.wait_for_all(lambda status, limit=limit: _end_at(limit))
        finally:
            engine.close()
            folder.end()
        assert site.returncode is not None


def _end_at(limit: float) -> None:
    """Raise TimeoutError when time is up."""
    if time.monotonic() > limit:
        raise TimeoutError
