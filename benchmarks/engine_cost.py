"""What processes and a network cost beside the simulation: seconds and bytes a round, round trips, memory, growth.

    python benchmarks/engine_cost.py [--rounds 10] [--soak 200]
    python benchmarks/engine_cost.py --soak-rounds 200

Rounds are fedit's on builtin:tiny with three devices, the same for every engine, training included; Flower is measured
where it is installed. Round trips are of messages that a device sends back as they are, over mutual TLS. Memory is the
resident set of each process at the end; what libraries share is counted in each. The soak sends 200 messages of 1 MiB
to a device and looks at memory and open files before and after. With --soak-rounds nothing else is done: two devices go
through so many rounds of one step each on one row, each measured on 20 examples, and every process is looked at after
the third round, in the middle and at the end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch

from spinecli.artifacts.directory import OutputOptions
from spinecli.config import make_config
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.federation.config import FederateConfig
from spinecli.federation.engine import Connect, Job, Reply
from spinecli.federation.engines.loopback import free_port
from spinecli.federation.engines.nvflare.certificates import certify, read_identity
from spinecli.federation.engines.nvflare.connection import Address, log_to
from spinecli.federation.engines.nvflare.engine import NvflareEngine
from spinecli.federation.history import RoundRecord
from spinecli.federation.launch import launch
from spinecli.federation.messages import Message
from spinecli.federation.request import FederatedRequest, open_request
from spinecli.remote.launch import on_this_machine

KIB, MIB = 1 << 10, 1 << 20


def echo(number: int) -> None:
    """A training process that sends back what it gets."""
    from multiprocessing.connection import Connection

    from spinecli.federation.engines import envelope
    from spinecli.federation.engines.nvflare.child import frame, unframed

    connection = Connection(number)
    connection.recv_bytes()
    connection.recv_bytes()
    ready = envelope.Ready(device_class="echo", memory_bytes=1, examples=1)
    connection.send_bytes(frame(envelope.READY, envelope.encode_envelope(ready)))
    while True:
        header, blob = envelope.decode_envelope(envelope.JobHeader, unframed(connection.recv_bytes())[1])
        answer = envelope.Answer(job=header.job, seconds=0.0)
        connection.send_bytes(frame(envelope.ANSWER, envelope.encode_envelope(answer, blob)))


def serve(port: int, identity: str) -> None:
    """A device with such a training process."""
    from spinecli.federation.engines.nvflare.site import Site

    log_to(Path(os.devnull))
    site = Site(
        "echo", Address("127.0.0.1", port), read_identity(Path(identity)), (sys.executable, __file__, "echo"), b""
    )

    def stop_at_the_end_of_input() -> None:
        sys.stdin.read()
        site.stop()

    threading.Thread(target=stop_at_the_end_of_input, daemon=True).start()
    site.run()


@contextmanager
def echoing(folder: Path) -> Iterator[tuple[NvflareEngine, subprocess.Popen[bytes]]]:
    """An engine with one echoing device."""
    certify(folder / "keys", ["echo"], ["127.0.0.1"])
    log_to(Path(os.devnull))
    port = free_port()
    engine = NvflareEngine(["echo"], b"", Address("127.0.0.1", port), read_identity(folder / "keys" / "server"))
    command = [sys.executable, __file__, "serve", str(port), str(folder / "keys" / "echo")]
    device = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        engine.wait_for_all(lambda standing: None)
        yield engine, device
    finally:
        engine.close()
        assert device.stdin is not None
        device.stdin.close()
        device.wait()


def round_trip(engine: NvflareEngine, size: int, times: int) -> float:
    """Median seconds of a message of this many bytes there and back."""
    message = Message({}, {"value": torch.zeros(size, dtype=torch.uint8)})
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        (outcome,) = engine.exchange([Job("echo", "echo", 0, message)], None)
        seconds.append(time.perf_counter() - began)
        assert isinstance(outcome, Reply)
    return statistics.median(seconds)


def resident(process: int) -> float:
    """Resident memory of a process in MB."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * KIB / 1e6


def open_files(process: int) -> int:
    """Open file descriptors of a process."""
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def descendants(process: int) -> list[int]:
    """Processes below this one."""
    children = [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def kind_of(process: int) -> str:
    """What a process of a launched fleet does, and of which device."""
    if process == os.getpid():
        return "server"
    words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return "training process" if b"spinecli.remote.trainer" in words else "device's process"


def request(
    rounds: int, engine: str, devices: int = 3, steps: int = 5, rows: int = 8, evaluate_every: int | None = None
) -> FederatedRequest:
    asked = {
        "data": "builtin:tiny-topics",
        "strategy": "fedit",
        "devices": devices,
        "engine": engine,
        "max_length": 32,
        "rounds": rounds,
        "cohort": devices,
        "local_steps": steps,
        "batch_size": rows,
        "evaluate_every": evaluate_every or rounds,
        "evaluation_limit": 20,
    }
    return open_request(make_config(FederateConfig, "builtin:tiny", asked))


def connector(engine: str, asked: FederatedRequest) -> Connect | None:
    """What starts an engine's processes on this machine; None where there are none."""
    if engine == "local":
        return None
    if engine == "nvflare":
        return lambda state: on_this_machine(asked, state, lambda line: None)
    from spinecli.remote import launch_flower

    return lambda state: launch_flower.on_this_machine(asked, state, lambda line: None)


def timed_rounds(rounds: int, engine: str, folder: Path, at_the_end: Callable[[], None]) -> tuple[float, float]:
    """Median seconds and mean bytes of a round, the first left out."""
    asked = request(rounds, engine)
    times, sizes = [time.perf_counter()], []

    def heard(record: RoundRecord) -> None:
        times.append(time.perf_counter())
        sizes.append(record.bytes)
        if record.round + 1 == rounds:
            at_the_end()

    with quiet_libraries():
        launch(asked, OutputOptions(folder / engine), listener=heard, connect=connector(engine, asked))
    gaps = [later - earlier for earlier, later in pairwise(times[1:])]
    return statistics.median(gaps), statistics.mean(sizes)


def soak(rounds: int, folder: Path) -> None:
    """Look at every process of a small federation after the third round, in the middle, and at the end."""
    asked = request(rounds, "nvflare", devices=2, steps=1, rows=1, evaluate_every=1)
    looks = sorted({3, rounds // 2, rounds})
    seen: dict[tuple[str, int], list[str]] = {}
    lost = 0

    def heard(record: RoundRecord) -> None:
        nonlocal lost
        lost += sum(device.lost is not None for device in record.devices)
        if record.round + 1 in looks:
            for each in (os.getpid(), *descendants(os.getpid())):
                look = f"{resident(each):.1f} MB, {open_files(each)} files"
                seen.setdefault((kind_of(each), each), []).append(look)

    began = time.perf_counter()
    with quiet_libraries():
        output = OutputOptions(folder / "soak")
        launch(asked, output, None, heard, lambda state: on_this_machine(asked, state, lambda line: None))
    print("| process | " + " | ".join(f"after round {number}" for number in looks) + " |")
    print("|---|" + "---:|" * len(looks))
    for (kind, _), found in sorted(seen.items()):
        print(f"| {kind} | {' | '.join(found)} |")
    print(f"\n{rounds} rounds in {time.perf_counter() - began:.0f} s with start and end; answers lost: {lost}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--soak", type=int, default=200)
    parser.add_argument("--soak-rounds", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    if options.soak_rounds is not None:
        soak(options.soak_rounds, folder)
        return
    print("| figure | value |\n|---|---:|")
    with echoing(folder) as (engine, device):
        round_trip(engine, KIB, 5)
        for name, size, times in (("64 KiB", 64 * KIB, 50), ("12 MiB", 12 * MIB, 10)):
            print(f"| round trip of {name} | {round_trip(engine, size, times) * 1e3:.0f} ms |", flush=True)
        round_trip(engine, MIB, 20)
        processes = {"server": os.getpid(), "device": device.pid}
        before = {name: (resident(each), open_files(each)) for name, each in processes.items()}
        round_trip(engine, MIB, options.soak)
        for name, each in processes.items():
            memory, files = resident(each) - before[name][0], open_files(each) - before[name][1]
            print(
                f"| {name} after {options.soak} exchanges of 1 MiB | {memory:+.1f} MB, {files:+d} files |", flush=True
            )
    found: list[str] = []

    def look() -> None:
        for each in sorted(descendants(os.getpid())):
            found.append(f"| {kind_of(each)} | {resident(each):.0f} MB |")

    engines = ["local", "nvflare", *(["flower"] if find_spec("flwr") else [])]
    for engine_name in engines:
        seconds, size = timed_rounds(options.rounds, engine_name, folder, look if engine_name == "nvflare" else list)
        print(f"| round, {engine_name} | {seconds:.2f} s, {size / 1e6:.2f} MB |", flush=True)
    print("\n".join(sorted(found)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["echo"]:
        echo(int(sys.argv[2]))
    elif sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        main()
