"""What a page says, as records, and the page itself: one file, without script and without a word to the network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from spinecli.evaluation.page.plot import Drawing, Plot

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class Finding:
    """What came of one model, in a sentence or two."""

    name: str
    text: str


@dataclass(frozen=True)
class Cell:
    """One figure, and below it what it is beside the first model's."""

    text: str
    ratio: str = ""
    judged: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Lines that belong together; without a name they need none."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class FigureTable:
    """Figures, a column a model or what the columns say."""

    title: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class KeptUnits:
    """How many heads or channels a block keeps."""

    kept: int
    of: int

    @property
    def percent(self) -> float:
        """Of what it had."""
        return 100 * self.kept / self.of if self.of else 0.0


@dataclass(frozen=True)
class CutRow:
    """Blocks in a row that were cut alike."""

    first: int
    last: int
    heads: KeptUnits
    channels: KeptUnits

    @property
    def removed(self) -> bool:
        """Whether nothing is left."""
        return not self.heads.kept and not self.channels.kept

    @property
    def blocks(self) -> str:
        """Their numbers."""
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class Cut:
    """What one model keeps, block by block of the dense one."""

    name: str
    summary: str
    rows: tuple[CutRow, ...]


@dataclass(frozen=True)
class Answers:
    """How every model goes on after the same words."""

    prompt: str
    said: tuple[tuple[str, str], ...]
    """Who says it, and what."""


@dataclass(frozen=True)
class Command:
    """One step of the way here."""

    line: str
    summary: str = ""
    file: str = ""
    """The content of the file that `--config` names in the line."""


@dataclass(frozen=True)
class Page:
    """Everything on it, in its order; what is empty is left out."""

    title: str
    findings: tuple[Finding, ...]
    """The first is the one that the page is about."""
    plots: tuple[Plot, ...]
    tables: tuple[FigureTable, ...]
    conditions: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()
    answers: tuple[Answers, ...] = ()
    commands: tuple[Command, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


def page_html(page: Page) -> str:
    """The page as one HTML document."""
    return _template("page.html.jinja").render(page=page)


def plot_svg(drawing: Drawing) -> str:
    """One plot as an SVG file of its own, light or dark as its reader's screen. Its points say what they are."""
    return _template("plot.svg.jinja").render(drawing=drawing)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("spinecli.evaluation.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
