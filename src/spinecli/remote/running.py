"""Processes of launched devices: started with a line on their standard input, and ended by closing it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from spinecli.errors import FederationError
from spinecli.federation.engines.enrolment_status import EnrolmentStatus

LOG_NAME = "log.txt"
_STOP_SECONDS = 10.0
_LAST_LINES = 3


@dataclass(frozen=True, eq=False)
class Running:
    """A device's process."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def ended(self) -> str | None:
        """How the process has ended; None while it runs."""
        code = self.process.poll()
        return None if code is None else f"its process has ended with exit code {code}"


def start(
    name: str, module: str, told: BaseModel, place: Path, environment: Mapping[str, str] | None = None
) -> Running:
    """Start a module as a device's process, with its log in a directory.

    Args:
        told: goes to its standard input as a line of JSON.
    """
    log = place / LOG_NAME
    with log.open("w", encoding="utf-8") as output:
        # a session of its own: Ctrl-C is for the launcher, which then ends its devices in order
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            text=True,
            env=environment,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(told.model_dump_json() + "\n")
    process.stdin.flush()
    return Running(name, process, log)


def require_all(running: Sequence[Running], status: EnrolmentStatus) -> None:
    """Raise FederationError if one of the devices cannot take part."""
    for name, explanation in status.troubles.items():
        raise FederationError(f"The device {name} cannot take part: {explanation}")
    for device in running:
        if (code := device.process.poll()) is not None:
            lines = device.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = " ".join(line.strip() for line in lines[-_LAST_LINES:]).strip()
            raise FederationError(f"The device {device.name} has ended with exit code {code}: {last}")


def stop(running: Sequence[Running]) -> None:
    """End every process: asked by closing its input, and made to if it does not listen."""
    for device in running:
        assert device.process.stdin is not None
        device.process.stdin.close()
    deadline = time.monotonic() + _STOP_SECONDS
    for device in running:
        try:
            device.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            device.process.kill()
            device.process.wait()
