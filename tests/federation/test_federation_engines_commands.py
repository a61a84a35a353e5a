from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from families import Recipe
from small_federations import LLAMA, labelled_rows
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.errors import MissingPackageError, OptionError
from spinecli.federation.config import DataConfig, FederateConfig
from spinecli.federation.simulation.fleet import load_fleet
from spinecli.remote.engines import require_flower, require_nvflare

FLARE = find_spec("nvflare") is not None
needs_nvflare = pytest.mark.skipif(not FLARE, reason="needs the extra nvflare")


def test_without_the_extra_every_door_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinecli.remote.engines.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'spinecli\[nvflare\]'"):
        require_nvflare("--engine nvflare")
    launched = ["fed-launch", "builtin:tiny", "--data", "builtin:tiny-topics", "--out", "o", "--engine", "nvflare"]
    served = ["fed-server", "builtin:tiny", "--data", "x", "--out", "o", "--devices", "a", "--listen", "127.0.0.1"]
    joined = ["fed-device", "builtin:tiny", "--data", "x", "--server", "127.0.0.1"]
    for command in (launched, served, joined, ["fed-certify", "keys", "--devices", "a"]):
        answer = CliRunner().invoke(app, command)
        assert answer.exit_code == 2
        assert "pip install 'spinecli[nvflare]'" in answer.stderr


def launched_with_flower(*more: str) -> str:
    """What `spine fed-launch --engine flower` says to a mistake."""
    command = ["fed-launch", "builtin:tiny", "--data", "builtin:tiny-topics", "--out", "o", "--engine", "flower"]
    answer = CliRunner().invoke(app, [*command, *more])
    assert answer.exit_code == 2
    return answer.stderr


def test_without_flower_a_sentence_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinecli.remote.engines.find_spec", lambda name: None)
    assert "needs Flower; install it with pip install 'spinecli[flower]'" in launched_with_flower()


@pytest.mark.parametrize("found", ["1.7.0", "1.40.0", "1.42.0", "2.0.0"])
def test_another_version_of_flower_is_told_from_the_one_that_is_used(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr("spinecli.remote.engines.find_spec", lambda name: object())
    monkeypatch.setattr("spinecli.remote.engines.version", lambda name: found)
    with pytest.raises(
        MissingPackageError, match=rf"{found} is here; install it with pip install 'spinecli\[flower\]'"
    ):
        require_flower("--engine flower")
    monkeypatch.setattr("spinecli.remote.engines.version", lambda name: "1.41.7")
    require_flower("--engine flower")


@pytest.mark.parametrize("strategy", ["mergesfl", "sfl-fm", "sfl-br", "splitfed", "fedavg"])
def test_flower_does_not_run_split_training_and_says_why(strategy: str) -> None:
    told = launched_with_flower("--strategy", strategy)
    assert f"--engine flower does not run {strategy}" in told
    assert "a process on the device for every message" in told
    assert "--engine nvflare or local" in told


def test_the_wall_clock_is_not_for_the_simulation() -> None:
    given = ["fed-launch", "builtin:tiny", "--data", "builtin:tiny-topics", "--out", "o", "--clock", "wall"]
    answer = CliRunner().invoke(app, given)
    assert answer.exit_code == 2
    assert "--engine nvflare" in answer.stderr


def test_a_fleet_is_scaled_to_the_devices_that_are_asked_for(tmp_path: Path) -> None:
    assert load_fleet("jetson-80", 3) == load_fleet("jetson-3")
    path = tmp_path / "own.toml"
    own = 'name = "own"\n' + "".join(
        f'[[class]]\nname = "{name}"\ncount = {count}\nmodes = 1e9\nup_mbps = 1\ndown_mbps = 1\nmemory_gb = 1\n'
        for name, count in (("few", 2), ("many", 6))
    )
    path.write_text(own)
    assert [spec.name for spec in load_fleet(str(path), 4).devices] == ["few-00", "many-00", "many-01", "many-02"]
    assert load_fleet(str(path), 4).source().digest != load_fleet(str(path)).source().digest


@needs_nvflare
@pytest.mark.parametrize("text", ["", ":80", "host:", "host:0", "host:99999", "host:x", "host:²", "::1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    from spinecli.remote.address import parse_address

    if text == "host:":
        assert parse_address(text, "--server").port == 8002
        return
    with pytest.raises(OptionError, match="--server"):
        parse_address(text, "--server")


@needs_nvflare
@pytest.mark.parametrize(
    ("host", "identity", "insecure", "allowed"),
    [
        ("127.0.0.1", None, True, True),
        ("localhost", None, True, True),
        ("127.0.0.1", None, False, False),
        ("10.0.0.1", None, True, False),
        ("0.0.0.0", None, True, False),
        ("train.example", None, True, False),
        ("10.0.0.1", Path("keys"), False, True),
        ("10.0.0.1", Path("keys"), True, False),
        ("127.0.0.1", Path("keys"), True, False),
    ],
)
def test_nothing_runs_unprotected_beyond_loopback(
    host: str, identity: Path | None, insecure: bool, allowed: bool
) -> None:
    from spinecli.remote.address import parse_address, require_protection

    address = parse_address(host, "--listen")
    if allowed:
        require_protection(address, identity, insecure=insecure)
    else:
        with pytest.raises(OptionError, match="--identity"):
            require_protection(address, identity, insecure=insecure)


@needs_nvflare
@pytest.mark.parametrize("name", ["", "..", "/a", "a/b", "a b", "a\n", "a" * 41])
def test_classes_that_could_name_a_path_are_refused(name: str) -> None:
    from spinecli.federation.engines.nvflare.names import require_class_name

    require_class_name("tx2_MaxN-1")
    with pytest.raises(OptionError, match="--class"):
        require_class_name(name)


@needs_nvflare
def test_a_server_needs_no_example_for_every_device(tmp_path: Path) -> None:
    from spinecli.remote.serve import open_server_request

    data = tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps({"text": "a b", "label": str(index % 2)}) + "\n" for index in range(4)))
    held_out = DataConfig(train=str(data), max_length=16)
    config = FederateConfig(model="builtin:tiny", data=held_out, strategy="fedit")
    request = open_server_request(config, [f"device-{index}" for index in range(30)])
    assert request.parts == ()
    assert len(request.evaluation) == 4


@needs_nvflare
@pytest.mark.parametrize("text", ["", "a,", "a,A", "a,a", "server", "a b", "../a"])
def test_names_that_cannot_be_are_refused(text: str) -> None:
    from spinecli.remote.address import parse_names

    with pytest.raises(OptionError):
        parse_names(text)


@needs_nvflare
def test_a_device_does_not_load_torch_until_it_trains() -> None:
    script = (
        "import sys, spinecli.remote.join, spinecli.remote.device, spinecli.remote.address; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@needs_nvflare
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more", "made", "kept"),
    [
        ("fedspine", ["--prune-interval", 1], "adapter_model.safetensors", {"device-log.txt", "memory.safetensors"}),
        ("mergesfl", ["--cut-layer", 1], "model.safetensors", {"device-log.txt"}),
    ],
)
def test_devices_with_files_of_their_own_train_together(
    tmp_path: Path, written: Callable[[Recipe], Path], strategy: str, more: list[object], made: str, kept: set[str]
) -> None:
    model = written(LLAMA)
    for name, count, seed in (("alpha", 30, 1), ("beta", 40, 2), ("held", 20, 3)):
        rows = labelled_rows(count, seed)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def spine(*words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "spinecli", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    assert spine("fed-certify", "keys", "--devices", "alpha,beta", "--host", "127.0.0.1").wait(300) == 0
    server = spine(
        *("fed-server", model, "--data", "held.jsonl", "--out", "out", "--devices", "alpha,beta"),
        *("--listen", f"127.0.0.1:{port}", "--identity", "keys/server", "--strategy", strategy, "--rounds", 3),
        *("--local-steps", 2, "--batch-size", 4, "--max-length", 16, "--deadline", 120, *more),
    )
    devices = [
        spine(
            *("fed-device", model, "--data", f"{name}.jsonl", "--server", f"127.0.0.1:{port}"),
            *("--identity", f"keys/{name}", "--state", f"state-{name}", "--class", name),
        )
        for name in ("alpha", "beta")
    ]
    try:
        _, told = server.communicate(timeout=600)
        assert server.returncode == 0, told
        for device in devices:
            said, noted = device.communicate(timeout=120)
            assert device.returncode == 0, noted
            assert "the run is over" in said
    finally:
        for process in (server, *devices):
            process.kill()
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert [[device["lost"] for device in record["devices"]] for record in history] == [[None, None]] * 3
    assert (tmp_path / "out" / made).is_file()
    assert {path.name for path in (tmp_path / "state-alpha").iterdir()} == kept


@needs_nvflare
def test_where_a_model_is_cut_must_be_told_before_its_devices_come(tmp_path: Path) -> None:
    given = [
        *("fed-server", "builtin:tiny", "--data", "builtin:tiny-topics-validation", "--out", str(tmp_path / "out")),
        *("--devices", "alpha", "--listen", "127.0.0.1", "--insecure", "--strategy", "mergesfl"),
    ]
    answer = CliRunner().invoke(app, given)
    assert answer.exit_code == 2
    assert "give a number of blocks" in " ".join(answer.stderr.split())
    answer = CliRunner().invoke(app, [*given, "--deploy"])
    assert answer.exit_code == 2
    assert "--deploy has no effect" in " ".join(answer.stderr.split())
