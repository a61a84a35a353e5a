from __future__ import annotations

from pathlib import Path

import pytest
from pages import read_page

from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.sweep.report import columns, conditions, sweep_html
from spinecli.evaluation.sweep.results import Speed, SweepResults, SweepRow, WindowRecord

TEXTS = ("a.txt", "b.txt")


def row(name: str, size: float, perplexity: float, *, timed: bool, texts: tuple[str, ...]) -> SweepRow:
    method = None if name == "dense" else name.rpartition("-")[0]
    speed = Speed(prefill=9, decode=2 / size, dense_prefill=9, dense_decode=2, prefill_ratio=1, decode_ratio=1 / size)
    return SweepRow(
        name=name,
        method=method,
        tuned="auto" if method == "flap" else None,
        sparsity=1 - size,
        achieved_sparsity=1 - size,
        removed_blocks=0,
        parameters=int(1e6 * size),
        block_parameters=int(9e5 * size),
        bytes=int(4e6 * size),
        flops_per_token=int(2e6 * size),
        held_out=perplexity / 9,
        perplexity=dict.fromkeys(texts, perplexity),
        speed=speed if timed else None,
    )


def made(*, timed: bool = True, texts: tuple[str, ...] = TEXTS, worst: float = 80.0) -> SweepResults:
    values = {"dense": (1.0, 5.0), "spine-0.2": (0.8, 6.0), "spine-0.5": (0.5, 20.0), "flap-0.5": (0.5, worst)}
    return SweepResults(
        model="model",
        held_out_by="next-token loss in nats",
        texts={text: WindowRecord(description=text, windows=4, window=32, stride=32) for text in texts},
        generation=GenerationConfig(prompt_length=8) if timed else None,
        machine={"device": "cpu", "threads": 1} if timed else None,
        rows=tuple(row(name, *value, timed=timed, texts=texts) for name, value in values.items()),
        refused=(),
    )


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], ()])
def test_the_curve_has_a_row_a_text_and_a_column_for_speed(tmp_path: Path, timed: bool, texts: tuple[str, ...]) -> None:
    image = pytest.importorskip("matplotlib.image")
    from spinecli.evaluation.sweep.report import save_curve

    for name in ("one.png", "two.png"):
        save_curve(made(timed=timed, texts=texts), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    height, width, _ = image.imread(tmp_path / "one.png").shape
    assert (width, height) == (144 * 5.2 * (1 + timed) // 1, 144 * 4 * max(1, len(texts)))


@pytest.mark.parametrize("worst", [0.0, 5.1, 900.0, 1e7])
def test_curves_of_any_span_can_be_drawn(tmp_path: Path, worst: float) -> None:
    pytest.importorskip("matplotlib")
    from spinecli.evaluation.sweep.report import save_curve

    save_curve(made(worst=worst), tmp_path / "curve.png")
    image = pytest.importorskip("matplotlib.image")
    assert image.imread(tmp_path / "curve.png").std() > 0.01  # something is drawn


def test_columns_and_sentences_say_what_was_measured() -> None:
    assert len(columns(made())) == 6 + 2 * len(TEXTS) + 1
    assert "perplexity" in columns(made(timed=False, texts=TEXTS[:1]))
    told = " ".join(conditions(made()))
    for words in ("Perplexity on a.txt: 4 windows of 32", "Perplexity on b.txt", "8 + 32 tokens", "flap by auto"):
        assert words in told
    assert "Speed" not in " ".join(conditions(made(timed=False)))


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], ()])
def test_the_page_names_every_point_whatever_was_measured(timed: bool, texts: tuple[str, ...]) -> None:
    results = made(timed=timed, texts=texts)
    page = read_page(sweep_html(results))
    assert {"dense", "20%", "50%"} <= page.names_beside_points()
    assert {row.name for row in results.rows} <= set(page.texts)
    assert {"spine", "flap, tuned by auto"} <= set(page.texts)
    assert page.text.count("million parameters") == 2 * max(1, len(texts))
    assert page.text.count("decode speed, ×") == 2 * timed
    assert sweep_html(results) == page.source


def test_the_page_begins_with_the_largest_cut_that_costs_little() -> None:
    dense, *points = (
        row(name, size, value, timed=True, texts=TEXTS[:1])
        for name, size, value in (
            ("dense", 1.0, 5.0),
            ("spine-0.2", 0.8, 5.1),
            ("spine-0.3", 0.7, 5.6),
            ("flap-0.2", 0.8, 5.2),
        )
    )
    text = read_page(sweep_html(made(texts=TEXTS[:1]).model_copy(update={"rows": (dense, *points)}))).text
    assert (
        "spine-0.2 is the largest cut within 10% of the dense model: 20.0% of the block parameters are gone, "
        "perplexity on a.txt goes from 5 to 5.1 (+2.0%), it generates 1.25 times as fast and takes 3.20 MB instead of "
        "4.00 MB."
    ) in text
    assert "spine-0.3 cuts most: 30.0%" in text


def test_the_page_of_a_hostile_sweep_is_a_page() -> None:
    hostile = "</style><script>'\"&"
    results = made(texts=TEXTS[:1], worst=float("inf")).model_copy(update={"model": hostile})
    assert f"Sweep of {hostile}" in read_page(sweep_html(results)).texts
    alone = results.model_copy(update={"rows": results.rows[:1]})
    assert "dense" in read_page(sweep_html(alone)).texts
