"""Write the tables of options in docs/commands from the commands themselves: python docs/option_tables.py."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main
from rich.text import Text

from spinecli.app import app

PAGES = Path(__file__).parent / "commands"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FIELDS = {
    info.name: info.callback.config.fields()  # type: ignore[union-attr]
    for info in app.registered_commands
    if hasattr(info.callback, "config")
}
_TABLE = re.compile(r"<!-- options -->\n.*?<!-- end of options -->\n", re.DOTALL)
_FIRST = "Options"


def table(name: str) -> str:
    """The options of a command as Markdown, in the parts of its help."""
    fields = {found.name: found for found in FIELDS.get(name, ())}
    parts: dict[str, list[str]] = {_FIRST: []}
    for option in COMMANDS[name].params:
        if not option.opts[0].startswith("-"):
            continue
        flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        found = fields.get(str(option.name))
        if found is None:
            default, meaning = "", Text.from_markup(option.help or "").plain
        else:
            default = "required" if found.required else found.default_in_words
            meaning = found.option.help
        part = getattr(option, "rich_help_panel", None) or _FIRST
        parts.setdefault(part, []).append(f"| {flags} | {_cell(default)} | {_cell(meaning)} |")
    drawn = []
    for part, rows in parts.items():
        if rows:
            head = "option" if part == _FIRST else part
            drawn.append("\n".join([f"| {head} | default | meaning |", "| --- | --- | --- |", *rows]))
    return "<!-- options -->\n" + "\n\n".join(drawn) + "\n<!-- end of options -->\n"


def with_table(page: str, name: str) -> str:
    """A page with the table that its command has now."""
    return _TABLE.sub(lambda _: table(name), page)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> None:
    """Rewrite every page."""
    for name in COMMANDS:
        page = PAGES / f"{name}.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
