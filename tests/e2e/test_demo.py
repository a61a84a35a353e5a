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


def run_demo(folder: Path) -> Demo:
    before = _children_seconds()
    finished = spine("demo", "--json", cwd=folder)
    return Demo(folder, finished, _children_seconds() - before)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spine_here: Here) -> None:
    """One test, since the run takes a minute and processes that share the suite would each make it."""
    demo = run_demo(tmp_path)
    it_ends_well_within_its_time(demo)
    it_announces_every_command_in_order(demo)
    tuning_wins_back_most_of_what_pruning_lost_and_healing_some_of_the_rest(demo)
    the_adapter_learns_the_topics(demo)
    the_plan_shortens_the_round_and_saves_traffic(demo)
    monkeypatch.chdir(demo.folder)
    the_announced_lines_are_the_runs_that_were_made(demo, spine_here)
    the_announced_plan_is_the_plan_that_was_made(demo, spine_here)


def it_ends_well_within_its_time(demo: Demo) -> None:
    assert demo.finished.code == 0, demo.finished.stderr
    assert demo.seconds < TWO_MINUTES


def it_announces_every_command_in_order(demo: Demo) -> None:
    lines = [line.split()[2] for line in demo.finished.stderr.splitlines() if line.startswith("$ spine ")]
    assert lines == ["prune", "tune", "heal", "eval", "plan", "fed-launch"]


def tuning_wins_back_most_of_what_pruning_lost_and_healing_some_of_the_rest(demo: Demo) -> None:
    found = demo.finished.json["perplexity"]
    assert found["dense"] < found["healed"] < found["tuned"] < found["pruned"]


def the_adapter_learns_the_topics(demo: Demo) -> None:
    accuracy = demo.finished.json["accuracy"]
    assert accuracy["before"] == pytest.approx(0.25, abs=0.1)
    assert accuracy["after"] > 0.7


def the_plan_shortens_the_round_and_saves_traffic(demo: Demo) -> None:
    found = demo.finished.json["plan"]
    assert found["seconds"] < found["uniform_seconds"]
    assert found["traffic_bytes"] < found["uniform_traffic_bytes"]


def the_announced_lines_are_the_runs_that_were_made(demo: Demo, spine_here: Here) -> None:
    """--resume prints a finished run again only if command, parameters and inputs are the same."""
    for command in ("prune", "tune", "heal", "fed-launch"):
        again = spine_here(*demo.announced(command), "--resume")
        assert again.code == 0, again.stderr


def the_announced_plan_is_the_plan_that_was_made(demo: Demo, spine_here: Here) -> None:
    before = contents(demo.folder / "spine-demo" / "plan")
    assert spine_here(*demo.announced("plan"), "--overwrite").code == 0
    assert contents(demo.folder / "spine-demo" / "plan") == before
