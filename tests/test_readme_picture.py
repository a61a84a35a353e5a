"""The picture on the README's first screen, and the figures below it, are those of RESULTS.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import readme_picture

    yield readme_picture
    del sys.modules["readme_picture"]


def test_the_picture_is_what_its_script_draws(script: Any) -> None:
    assert script.drawn(script.MODEL) == script.PICTURE.read_text(encoding="utf-8")


def test_the_picture_is_well_formed_and_light_or_dark(script: Any) -> None:
    text = script.drawn(script.MODEL)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme: dark" in text
    shown = " ".join(root.itertext())
    for method in script.METHODS.values():
        assert f"{method} at 50%" in shown or f"{method}: " in shown


def test_a_model_without_figures_is_refused(script: Any) -> None:
    with pytest.raises(ValueError, match="no figures of unheard-of"):
        script.plot("unheard-of")


def test_every_figure_of_the_first_screen_is_in_the_results() -> None:
    results = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    first = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Two commands")[0]
    figures = re.findall(r"\d+\.\d\d", first)
    assert len(figures) > 15
    # RESULTS.md has four decimals where two models are compared
    rounded = {f"{float(figure):.2f}" for figure in re.findall(r"\d+\.\d+", results)}
    assert set(figures) <= rounded
