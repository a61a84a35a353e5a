from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.evaluation.page.labels import Box, place_labels, shortened, width_of
from spinecli.evaluation.page.plot import Plot, Point, axis_of, tick_texts

NUMBERS = st.floats(min_value=-1e9, max_value=1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.booleans())
def test_an_axis_shows_all_values_and_some_round_ones(values: list[float], may_bend: bool) -> None:
    axis = axis_of(values, may_bend=may_bend)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert len(axis.ticks) <= 8
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in axis.ticks)


def test_ticks_have_as_many_decimals_as_tell_them_apart() -> None:
    assert tick_texts(axis_of([1.0, 2.0])) == ("1.0", "1.2", "1.4", "1.6", "1.8", "2.0")
    assert tick_texts(axis_of([0.0, 10.0])) == ("0", "2", "4", "6", "8", "10")
    assert tick_texts(axis_of([0.5, 0.8]), percent=True) == ("50%", "55%", "60%", "65%", "70%", "75%", "80%")
    assert tick_texts(axis_of([0.070, 0.074]), percent=True)[0] == "7.0%"


def test_an_axis_of_values_that_span_decades_bends() -> None:
    axis = axis_of([30.0, 3000.0], may_bend=True)
    assert axis.logarithmic
    assert axis.share(300.0) == pytest.approx(0.5)
    assert not axis_of([30.0, 60.0], may_bend=True).logarithmic
    assert not axis_of([0.0, 3000.0], may_bend=True).logarithmic


PLACES = st.lists(st.tuples(st.floats(20, 340), st.floats(20, 320)), min_size=1, max_size=14)


@given(PLACES)
def test_no_label_covers_another_or_a_point(places: list[tuple[float, float]]) -> None:
    room = Box(0, 0, 360, 340)
    found = place_labels(places, [(f"model-{number}", "12.34") for number in range(len(places))], room, 12)
    boxes = [label.box for label in found if label is not None]
    assert all(box.within(room) for box in boxes)
    for index, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[:index])
        assert not any(box.meets(Box(x - 5, y - 5, x + 5, y + 5)) for x, y in places)


def test_a_long_name_keeps_its_two_ends() -> None:
    name = shortened("spine-adaptive-" + "x" * 80 + "-0.5", 12, 120)
    assert name.startswith("spine-a")
    assert name.endswith("-0.5")
    assert width_of(name, 12) <= 120
    assert shortened("dense", 12, 120) == "dense"


def test_a_plot_leaves_out_what_has_no_place_and_says_so() -> None:
    points = (Point("dense", 1, 1, "", series=0), Point("lost", 1, math.inf, ""), Point("nothing", 1, math.nan, ""))
    drawing = Plot("title", "x", "y", points).wide
    assert [mark.point.name for mark in drawing.marks] == ["dense"]
    assert drawing.unnamed == ("lost", "nothing")


def test_the_points_of_a_series_are_joined_from_the_reference_on() -> None:
    points = (Point("dense", 2, 1, "", series=0), Point("a", 1, 2, ""), Point("b", 1, 3, "", series=2))
    drawing = Plot("title", "x", "y", points, series=("dense", "one", "two")).wide
    assert [number for number, _ in drawing.lines] == [1, 2]
    assert len({path.partition("L")[0] for _, path in drawing.lines}) == 1
    assert Plot("title", "x", "y", points).wide.lines == ()


def test_a_difference_of_nothing_is_not_drawn_as_one() -> None:
    axis = axis_of([4.2739, 4.2742])
    assert axis.share(4.2742) - axis.share(4.2739) < 0.01
    assert axis.low < 4.2739 < 4.2742 < axis.high
