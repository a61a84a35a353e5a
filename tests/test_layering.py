from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import spinecli

PACKAGE = Path(spinecli.__file__).parent
FRONT = {"app.py", "console.py", "__main__.py"}


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_library_code_never_imports_the_terminal_or_its_front() -> None:
    behind = ("typer", "rich", "spinecli.console", "spinecli.commands", "spinecli.app")
    guilty = {
        file.relative_to(PACKAGE).as_posix(): sorted(names)
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "commands" and file.name not in FRONT
        if (names := {name for name in imported_packages(file) if name.startswith(behind)})
    }
    assert guilty == {}


def test_lower_packages_do_not_import_higher_ones() -> None:
    ranks = ["artifacts", "data", "checkpoints", "calibration", "lora", "masktuning", "pruning"]
    guilty = [
        (file.relative_to(PACKAGE).as_posix(), name)
        for rank, package in enumerate(ranks)
        for file in (PACKAGE / package).rglob("*.py")
        for name in imported_packages(file)
        if name.startswith(
            tuple(f"spinecli.{higher}" for higher in [*ranks[rank + 1 :], "evaluation", "federation", "split"])
        )
    ]
    assert guilty == []


def test_federation_does_not_know_split_training() -> None:
    guilty = [
        file.relative_to(PACKAGE).as_posix()
        for file in (PACKAGE / "federation").rglob("*.py")
        if any(name.startswith("spinecli.split") for name in imported_packages(file))
    ]
    assert guilty == []


def test_the_command_line_answers_without_torch() -> None:
    script = "import sys, spinecli.app; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
