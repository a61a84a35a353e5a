"""`spine demo` does what it announces, within its time, and the adapter that it trains has learned."""

from __future__ import annotations

import resource
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from spine_process import Finished, Here, spine
from sums import contents

pytestmark = pytest.mark.slow

TWO_MINUTES = 120


@dataclass(frozen=True)
class Demo:
    """One run of the demo."""

    folder: Path
    finished: Finished
    seconds: float
    """Of the processor, on one thread: those of an idle machine's clock, however busy this one is."""

    def announced(self, command: str) -> list[str]:
        """The words of the one line that was announced for a command."""
        lines = [line for line in self.finished.stderr.splitlines() if line.startswith(f"$ spine {command} ")]
        assert len(lines) == 1, lines
        return shlex.split(lines[0])[2:]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    before = _children_seconds()
    finished = spine("demo", "--json", cwd=folder)
    return Demo(folder, finished, _children_seconds() - before)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_it_ends_well_within_its_time(demo: Demo) -> None:
    assert demo.finished.code == 0, demo.finished.stderr
    assert demo.seconds < TWO_MINUTES


def test_it_announces_every_command_in_order(demo: Demo) -> None:
    lines = [line.split()[2] for line in demo.finished.stderr.splitlines() if line.startswith("$ spine ")]
    assert lines == ["prune", "tune", "heal", "eval", "plan", "fed-launch"]


def test_tuning_wins_back_most_of_what_pruning_lost_and_healing_some_of_the_rest(demo: Demo) -> None:
    found = demo.finished.json["perplexity"]
    assert found["dense"] < found["healed"] < found["tuned"] < found["pruned"]


def test_the_adapter_learns_the_topics(demo: Demo) -> None:
    accuracy = demo.finished.json["accuracy"]
    assert accuracy["before"] == pytest.approx(0.25, abs=0.1)
    assert accuracy["after"] > 0.7


def test_the_plan_shortens_the_round_and_saves_traffic(demo: Demo) -> None:
    found = demo.finished.json["plan"]
    assert found["seconds"] < found["uniform_seconds"]
    assert found["traffic_bytes"] < found["uniform_traffic_bytes"]


@pytest.mark.parametrize("command", ["prune", "tune", "heal", "fed-launch"])
def test_the_announced_line_is_the_run_that_was_made(
    demo: Demo, command: str, monkeypatch: pytest.MonkeyPatch, spine_here: Here
) -> None:
    """--resume prints a finished run again only if command, parameters and inputs are the same."""
    monkeypatch.chdir(demo.folder)
    again = spine_here(*demo.announced(command), "--resume")
    assert again.code == 0, again.stderr


def test_the_announced_plan_is_the_plan_that_was_made(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, spine_here: Here
) -> None:
    monkeypatch.chdir(demo.folder)
    before = contents(demo.folder / "spine-demo" / "plan")
    assert spine_here(*demo.announced("plan"), "--overwrite").code == 0
    assert contents(demo.folder / "spine-demo" / "plan") == before
