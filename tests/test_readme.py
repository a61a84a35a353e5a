"""What the documents tell a reader to type works as they say."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from spinecli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
INSTALLING = ("make", "pip", "git", "python3", ".")
# These mean the same in every command, so a page may leave them to that of `spine prune`, which has them all.
SHARED = {"--help", "--device", "--dtype", "--overwrite", "--json", "--quiet", "-q", "--debug"}
# What a page takes for a good result and a test need not wait for.
AMOUNTS = {"--calibration-rows 64": "--calibration-rows 16", "--limit 1000": "--limit 200", "rows=32": "rows=8"}

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def with_less_data(text: str) -> str:
    found = [amount for amount in AMOUNTS if amount in text]
    assert found
    for amount in found:
        text = text.replace(amount, AMOUNTS[amount])
    return text


def option_names(command: str) -> set[str]:
    return {name for option in COMMANDS[command].params for name in option.opts if name.startswith("-")} | {"--help"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell in which `spine` is the one under test, installed or not."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    spine = binaries / "spine"
    spine.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m spinecli "$@"\n')
    spine.chmod(spine.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def run(command: list[str], directory: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_readme_works_from_top_to_bottom(tmp_path: Path, environment: dict[str, str]) -> None:
    readme = ROOT / "README.md"
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.split(" ")[0] not in INSTALLING]
    assert any(line.startswith("spine tune") for line in commands)
    place = tmp_path / "work"
    place.mkdir()
    run(["bash", "-euo", "pipefail", "-c", with_less_data("\n".join(commands))], place, environment)
    for snippet in blocks(readme, "python"):
        run([sys.executable, "-c", snippet], place, environment)


@pytest.mark.slow
def test_the_python_page_works_from_top_to_bottom(tmp_path: Path, environment: dict[str, str]) -> None:
    snippets = blocks(ROOT / "docs" / "python.md", "python")
    run([sys.executable, "-c", with_less_data("\n".join(snippets))], tmp_path, environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_on_a_page_use_only_options_that_exist(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[:1] != ["spine"] or len(words) < 2 or words[1].startswith("-"):
            continue
        named = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert named <= option_names(words[1]), line


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_page_has_every_option(command: str) -> None:
    page = (ROOT / "docs" / "commands" / f"{command}.md").read_text(encoding="utf-8")
    expected = option_names(command) - (SHARED if command != "prune" else {"--help"})
    missing = {name for name in expected if f"`{name}" not in page}
    assert missing == set()
