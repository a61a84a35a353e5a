from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from spinecli.federation.engine import Node
from spinecli.federation.rounds import draw_cohort

NODES = [Node(f"device-{number:02d}", "any", 1, 1) for number in range(20)]
NAMES = [node.name for node in NODES]


@given(st.integers(1, 30), st.integers(0, 99), st.integers(0, 99))
def test_a_cohort_is_so_many_of_the_fleet_in_its_order(size: int, seed: int, number: int) -> None:
    cohort = draw_cohort(NODES, size, seed, number)
    assert len(set(cohort)) == len(cohort) == min(size, len(NODES))
    assert cohort == [name for name in NAMES if name in cohort]
    assert cohort == draw_cohort(NODES, size, seed, number)


def test_every_device_has_its_turn_as_often_as_the_others() -> None:
    turns = Counter(name for number in range(400) for name in draw_cohort(NODES, 5, 0, number))
    assert set(turns) == set(NAMES)
    assert 60 < min(turns.values()) <= max(turns.values()) < 140


def test_rounds_and_seeds_draw_anew() -> None:
    drawn = {tuple(draw_cohort(NODES, 5, seed, number)) for seed in range(3) for number in range(10)}
    assert len(drawn) == 30
