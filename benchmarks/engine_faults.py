"""What becomes of a run when devices, their training processes, the server or a message go wrong.

    python benchmarks/engine_faults.py [--folder DIR]

One `spine fed-server` and three `spine fed-device` talk over the loopback interface, and train for real on
builtin:tiny. Faults are put in one after another, and the table is read from the run's own history. The last two are
put in by a device that is not honest: this file, in place of `spine fed-device`, alters what its training has made.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEVICES = ("alpha", "beta", "gamma")
ROUNDS = 60
DEADLINE = 25
LIMIT = 400.0
SPINE = (sys.executable, "-m", "spinecli")


def train_dishonestly(fault: str, number: int) -> None:
    """A training process whose answers are altered on their way out."""
    import torch

    from spinecli.federation.engines.envelope import Answer, encode_envelope
    from spinecli.federation.messages import Message
    from spinecli.remote import trainer

    def spoiled(header: object, carried: bytes = b"") -> bytes:
        if isinstance(header, Answer):
            if fault == "cut":
                carried = carried[:-100]
            else:
                message = Message.unpack(carried)
                name = next(name for name, value in message.tensors.items() if value.is_floating_point())
                tensors = {**message.tensors, name: torch.full_like(message.tensors[name], torch.nan)}
                carried = Message(message.header, tensors).pack()
        return encode_envelope(header, carried)  # type: ignore[arg-type]

    trainer.encode_envelope = spoiled  # type: ignore[attr-defined]
    trainer.main(number)


def serve_dishonestly(fault: str, *arguments: str) -> None:
    """`spine fed-device` with a training process of this file."""
    import spinecli.remote.join
    from spinecli.app import app

    spinecli.remote.join.TRAINER = (sys.executable, __file__, "train", fault)  # type: ignore[assignment]
    app(["fed-device", *arguments])


class Run:
    """A server, its devices, and the history that they write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._environment = environment
        names = ",".join(DEVICES)
        subprocess.run([*SPINE, "fed-certify", folder / "keys", "--devices", names, "--host", "127.0.0.1"], check=True)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.txt").open("a") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)

    def serve(self, *more: str) -> None:
        """Start the server."""
        self._start(
            "server",
            [
                *(*SPINE, "fed-server", "builtin:tiny", "--data", "builtin:tiny-topics-validation"),
                *("--out", str(self.folder / "out"), "--devices", ",".join(DEVICES)),
                *("--listen", f"127.0.0.1:{self.port}", "--identity", str(self.folder / "keys" / "server")),
                *("--strategy", "fedspine", "--rounds", str(ROUNDS), "--local-steps", "20", "--batch-size", "8"),
                *(
                    "--max-length",
                    "48",
                    "--deadline",
                    str(DEADLINE),
                    "--sparsity",
                    "0.3",
                    "--evaluation-limit",
                    "40",
                    "--evaluate-every",
                    "20",
                ),
                *more,
            ],
        )

    def join(self, device: str, fault: str | None = None) -> None:
        """Start a device, honest or with a fault."""
        start = [*SPINE, "fed-device"] if fault is None else [sys.executable, __file__, "serve", fault]
        self._start(
            device,
            [
                *(*start, "builtin:tiny", "--data", "builtin:tiny-topics", "--server", f"127.0.0.1:{self.port}"),
                *("--identity", str(self.folder / "keys" / device), "--state", str(self.folder / device)),
            ],
        )

    def trainer(self, device: str) -> int:
        """Process id of a device's training."""
        parent = self.processes[device].pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(children[-1])

    def history(self) -> list[dict[str, Any]]:
        """The rounds so far."""
        for path in (self.folder / "out" / "history.jsonl", self.folder / ".out.spine-work/files/history.jsonl"):
            if path.is_file():
                return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return []

    def rounds(self) -> int:
        """How many rounds are over."""
        return len(self.history())

    def wait(self, holds: Callable[[], bool]) -> None:
        """Until something holds; TimeoutError if it never does."""
        limit = time.monotonic() + LIMIT
        while not holds():
            if time.monotonic() > limit:
                raise TimeoutError("the run has not moved on")
            time.sleep(0.1)

    def outcome(self, number: int) -> str:
        """Who was lost in a round, why, and who answered."""
        devices = self.history()[number]["devices"]
        found = [f"{each['device']} {each['lost']}: {each['explanation']}" for each in devices if each["lost"]]
        answered = [each["device"] for each in devices if not each["lost"]]
        return f"{'; '.join(found) or 'nobody lost'}; answered: {', '.join(answered) or 'nobody'}"

    def first(self, device: str, after: int, *, lost: bool, reason: str | None = None) -> int:
        """The first round from `after` on that a device is lost in, or answers in; waits for it."""

        def found() -> list[int]:
            return [
                number
                for number, record in enumerate(self.history())
                if number >= after
                and any(
                    each["device"] == device and bool(each["lost"]) == lost and reason in (None, each["lost"])
                    for each in record["devices"]
                )
            ]

        self.wait(lambda: bool(found()))
        return found()[0]

    def end(self) -> None:
        """End every process."""
        for process in self.processes.values():
            process.kill()
            process.wait()


def struck(run: Run, device: str, fault: Callable[[], object]) -> int:
    """Put a fault into the middle of a round; returns the round that the device was lost in."""
    number = run.rounds()
    run.wait(lambda: run.rounds() > number)
    time.sleep(0.5)
    fault()
    return run.first(device, number + 1, lost=True)


def faults(run: Run) -> Iterator[tuple[str, str]]:
    """Put in all faults; what each was, and what came of it."""
    run.serve()
    for device in DEVICES:
        run.join(device)
    run.wait(lambda: run.rounds() >= 2)

    number = struck(run, "alpha", lambda: os.kill(run.trainer("alpha"), signal.SIGKILL))
    back = run.first("alpha", number + 1, lost=False)
    yield "training process killed (SIGKILL)", f"{run.outcome(number)}; alpha answers again in round {back + 1}"

    number = struck(run, "beta", run.processes["beta"].kill)
    first = run.outcome(number)
    run.join("beta")
    back = run.first("beta", number + 1, lost=False)
    yield (
        "device's process killed (SIGKILL), started again after that round",
        f"{first}; beta answers again in round {back + 1}",
    )

    stopped = [run.processes["gamma"].pid, run.trainer("gamma")]
    number = struck(run, "gamma", lambda: [os.kill(each, signal.SIGSTOP) for each in stopped])
    for each in stopped:
        os.kill(each, signal.SIGCONT)
    back = run.first("gamma", number + 1, lost=False)
    yield (
        f"device stopped (SIGSTOP) beyond the deadline of {DEADLINE} s, then continued",
        f"{run.outcome(number)}; gamma answers again in round {back + 1}",
    )

    before = run.rounds()
    run.processes["server"].kill()
    run.processes["server"].wait()
    before = run.rounds()
    alive = [device for device in DEVICES if run.processes[device].poll() is None]
    run.serve("--resume")
    run.wait(lambda: run.rounds() > before)
    yield (
        "server killed (SIGKILL), started again with --resume",
        f"goes on with round {before + 1}; devices still up: {', '.join(alive)}; {run.outcome(before)}",
    )

    for fault, what in (("cut", "answer cut short by its device"), ("nan", "answer altered by its device: NaN in it")):
        run.processes["alpha"].terminate()
        run.processes["alpha"].wait()
        run.join("alpha", fault)
        number = run.first("alpha", run.rounds(), lost=True, reason="refused")
        yield what, run.outcome(number)
    run.processes["alpha"].terminate()
    run.processes["alpha"].wait()
    run.join("alpha")
    back = run.first("alpha", run.rounds(), lost=False)
    run.wait(lambda: run.processes["server"].poll() is not None)
    code = run.processes["server"].returncode
    yield (
        "the whole run",
        f"exit code {code}, {run.rounds()} of {ROUNDS} rounds; alpha, honest again, from {back + 1} on",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    run = Run(folder)
    try:
        print("| fault | what happens |\n|---|---|")
        for what, outcome in faults(run):
            print(f"| {what} | {outcome} |", flush=True)
    finally:
        run.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_dishonestly(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["serve"]:
        serve_dishonestly(*sys.argv[2:])
    else:
        main()
