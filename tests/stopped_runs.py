"""Federated runs that end in the middle, as if they had been killed behind a round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spinecli.artifacts.directory import OutputOptions
from spinecli.federation.history import RoundRecord


class StoppedError(Exception):
    pass


class Until:
    """A listener that stops the run behind one round."""

    def __init__(self, last: int | None) -> None:
        self.last = last
        self.heard: list[int] = []

    def __call__(self, record: RoundRecord) -> None:
        self.heard.append(record.round)
        if record.round == self.last:
            raise StoppedError


def stopped(launch: Callable[..., Any], request: Any, out: Path, last: int, *, resume: bool = False) -> None:
    """Run `launch` until behind round `last`; nothing is published."""
    with pytest.raises(StoppedError):
        launch(request, OutputOptions(out, resume=resume), listener=Until(last))
    assert not out.exists()
