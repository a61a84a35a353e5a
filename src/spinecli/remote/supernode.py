"""A device of `spine fed-launch --engine flower`: `python -m spinecli.remote.supernode`.

A `LaunchedSuperNode` comes on its input.

It is a SuperNode of Flower, and starts Flower's SuperExec beside it, which starts a process for every message. When
its standard input closes, all of them end at once, so a launcher that dies takes its devices with it; so they do when
the SuperExec dies, without which no message would be answered.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from spinecli.artifacts.record import Record
from spinecli.federation.engines.loopback import LOOPBACK, free_port
from spinecli.remote.client_config import ClientConfig
from spinecli.remote.run_config import RunConfig

SETTING = "supernode_config"
"""Name of the SuperNode's own value that says which file it is in."""


class SuperNodeConfig(Record):
    """What a device is, what the run asks of it, and how it shows who it is."""

    client: ClientConfig
    run_config: RunConfig
    token: str
    """By which the server knows it."""


class LaunchedSuperNode(Record):
    """What a SuperNode is told by its launcher."""

    superlink: int
    """Port of the server, on loopback."""
    settings: Path
    """File of the SuperNode's own values, which its ClientApps get: a .toml."""
    secret: Path
    """File of a secret that SuperNode and SuperExec share; without it, anybody on this machine could take a message."""


def main() -> None:
    """Be the SuperNode that the first line of standard input describes."""
    launched = LaunchedSuperNode.model_validate_json(sys.stdin.readline())
    runtime = f"{LOOPBACK}:{free_port()}"
    shared = ["--insecure", "--superexec-auth-secret-file", str(launched.secret)]
    executor = ["flower-superexec", *shared, "--runtime-api-address", runtime, "--parent-pid", str(os.getpid())]
    superexec = subprocess.Popen(executor, stdin=subprocess.DEVNULL)
    for end in (sys.stdin.read, superexec.wait):
        threading.Thread(target=_end_after, args=(end,), daemon=True).start()
    from flwr.supernode.cli.flower_supernode import flower_supernode

    host, _, port = runtime.partition(":")
    sys.argv = [
        *("flower-supernode", *shared, "--isolation", "process", "--host", host, "--port", port),
        *("--superlink", f"{LOOPBACK}:{launched.superlink}", "--node-config", str(launched.settings)),
    ]
    flower_supernode()


def _end_after(happens: Callable[[], object]) -> None:
    happens()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
