from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.federation.loop import Schedule, learning_rate

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@given(st.floats(1e-6, 1), st.sampled_from(SCHEDULES), st.integers(1, 100))
def test_it_begins_at_the_base_and_never_rises_nor_falls_below_a_tenth(
    base: float, kind: Schedule, rounds: int
) -> None:
    rates = [learning_rate(base, kind, number, rounds) for number in range(rounds)]
    assert rates[0] == pytest.approx(base)
    assert all(before >= after for before, after in pairwise(rates))
    assert rates[-1] >= 0.1 * base * (1 - 1e-9)


@pytest.mark.parametrize(("kind", "middle", "end"), [("constant", 1, 1), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)])
def test_where_it_stands_in_the_middle_and_at_the_end(kind: Schedule, middle: float, end: float) -> None:
    assert learning_rate(2.0, kind, 50, 100) == pytest.approx(2 * middle)
    assert learning_rate(2.0, kind, 100, 100) == pytest.approx(2 * end)
