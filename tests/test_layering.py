from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import spinecli

PACKAGE = Path(spinecli.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
FRONT = {"app.py", "console.py", "__main__.py"}
# Known by every room; they import none but each other.
EVERYWHERE = {"errors", "config"}


def drawn() -> dict[str, set[str]]:
    """The rooms as the page on architecture draws them, the lowest first: room -> rooms that it imports."""
    block = re.search(r"```text rooms\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    lines = (line.partition("─▶") for line in block[1].splitlines() if line.strip())
    return {room.strip(): set(re.findall(r"\w+", below)) for room, _, below in lines}


def imported(file: Path) -> Iterator[str]:
    """Modules of spinecli that a file imports anywhere, and other packages."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "spinecli":
            yield from (f"spinecli.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def files_of(room: str) -> list[Path]:
    """The modules of a room, which may be a single one."""
    alone = PACKAGE / f"{room}.py"
    return [alone] if alone.is_file() else sorted((PACKAGE / room).rglob("*.py"))


def rooms_below(room: str) -> set[str]:
    """Rooms that a room imports."""
    names = {name for file in files_of(room) for name in imported(file) if name.startswith("spinecli.")}
    return {name.split(".")[1] for name in names} - EVERYWHERE - {room}


def test_the_drawing_shows_every_room_and_every_arrow() -> None:
    present = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    rooms = drawn()
    assert rooms.keys() == present - EVERYWHERE - {"__init__", "__main__"}
    # the built-in model's texts and tables are known by name, and made when they are asked for
    assert rooms_below("data") - rooms["data"] == {"demo"}
    found = {room: rooms_below(room) - ({"demo"} if room == "data" else set()) for room in rooms}
    assert found == rooms


def test_no_arrow_points_up() -> None:
    order = list(drawn())
    upward = [
        (room, other) for room, below in drawn().items() for other in below if order.index(other) > order.index(room)
    ]
    assert upward == []


def test_library_code_never_imports_the_terminal_or_its_front() -> None:
    behind = ("typer", "rich", "spinecli.console", "spinecli.commands", "spinecli.app")
    guilty = {
        file.relative_to(PACKAGE).as_posix(): sorted(names)
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "commands" and file.name not in FRONT
        if (names := {name for name in imported(file) if name.startswith(behind)})
    }
    assert guilty == {}


def test_federation_knows_split_training_by_the_names_of_its_strategies_alone() -> None:
    inside = PACKAGE / "federation" / "split"
    guilty = [
        file.relative_to(PACKAGE).as_posix()
        for file in (PACKAGE / "federation").rglob("*.py")
        if inside not in file.parents and any(name.startswith("spinecli.federation.split") for name in imported(file))
    ]
    assert guilty == []


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and file.parent.name != "commands":
                places.setdefault(node.name, []).append(file.relative_to(PACKAGE).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_a_module_is_at_most_five_hundred_lines() -> None:
    assert [
        file.name for file in PACKAGE.rglob("*.py") if len(file.read_text(encoding="utf-8").splitlines()) > 500
    ] == []


def test_the_command_line_answers_without_torch() -> None:
    script = "import sys, spinecli.app; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
