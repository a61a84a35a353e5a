"""The tables of options in the documentation are those of the commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import typer.main

from spinecli.app import app

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("option_tables", DOCS / "option_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_has_the_options_that_its_command_has_now(tables: Any, command: str) -> None:
    page = (DOCS / "commands" / f"{command}.md").read_text(encoding="utf-8")
    assert "<!-- options -->" in page
    assert tables.with_table(page, command) == page, "run python docs/option_tables.py"
